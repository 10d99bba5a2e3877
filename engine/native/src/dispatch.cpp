#include <stdexcept>

#include "kernels.h"

namespace kvasir {

namespace {

struct Path {
  const char* name;
  bool is_runnable;
  const Kernels& (*kernels)();
};

GemmKernel& gemm_at(Kernels& kernels, WeightFormat format) {
  return kernels.gemm[static_cast<int>(format)];
}

#ifdef KVASIR_X86
// The AVX-512 path, with VNNI for integer products where the processor has it.
const Kernels& best_avx512_kernels() {
  static const Kernels table = [] {
    Kernels kernels = avx512_kernels();
    if (!__builtin_cpu_supports("avx512vnni")) return kernels;
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
      gemm_at(kernels, format) = vnni_gemm(format);
    }
    kernels.kv[static_cast<int>(KvFormat::kInt8)] = vnni_int8_kv();
    return kernels;
  }();
  return table;
}

const Kernels& avx512bf16_kernels() {
  static const Kernels table = [] {
    Kernels kernels = best_avx512_kernels();
    kernels.name = "avx512bf16";
    gemm_at(kernels, WeightFormat::kBf16) = avx512bf16_gemm();
    return kernels;
  }();
  return table;
}

const Kernels& amx_kernels() {
  static const Kernels table = [] {
    Kernels kernels = best_avx512_kernels();
    kernels.name = "amx";
    for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt8}) {
      gemm_at(kernels, format) = amx_gemm(format);
    }
    return kernels;
  }();
  return table;
}

// AMX as CPUID leaf 7 tells: bf16, tiles, int8. gcc 12 has no name for it.
bool has_amx() {
  constexpr uint32_t kBits = (1u << 22) | (1u << 24) | (1u << 25);
  uint32_t eax = 7, ebx = 0, ecx = 0, edx = 0;
  asm("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (edx & kBits) == kBits && may_use_amx();
}
#endif

const Kernels& avx512bf16_model() {
  static const Kernels table = [] {
    Kernels kernels = scalar_kernels();
    kernels.name = "avx512bf16-model";
    gemm_at(kernels, WeightFormat::kBf16) = avx512bf16_model_gemm();
    return kernels;
  }();
  return table;
}

const Kernels& amx_model() {
  static const Kernels table = [] {
    Kernels kernels = scalar_kernels();
    kernels.name = "amx-model";
    for (const WeightFormat format : {WeightFormat::kBf16, WeightFormat::kInt8}) {
      gemm_at(kernels, format) = amx_model_gemm(format);
    }
    return kernels;
  }();
  return table;
}

std::vector<Path> all_paths() {
  std::vector<Path> paths = {{"scalar", true, scalar_kernels}};
#ifdef KVASIR_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  paths.push_back({"avx2", has_avx2, avx2_kernels});
  paths.push_back({"avx512", has_avx512, best_avx512_kernels});
  paths.push_back({"avx512bf16", has_bf16, avx512bf16_kernels});
  paths.push_back({"amx", has_avx512 && has_amx(), amx_kernels});
#endif
  return paths;
}

const std::vector<Path>& all_models() {
  static const std::vector<Path> models = {{"avx512bf16-model", true, avx512bf16_model},
                                           {"amx-model", true, amx_model}};
  return models;
}

}  // namespace

std::vector<std::string> runnable_paths() {
  std::vector<std::string> names;
  for (const Path& path : all_paths()) {
    if (path.is_runnable) names.push_back(path.name);
  }
  return names;
}

std::vector<std::string> model_paths() {
  std::vector<std::string> names;
  for (const Path& path : all_models()) names.push_back(path.name);
  return names;
}

WeightFormat weight_format_of(const std::string& name) {
  if (name == "bf16") return WeightFormat::kBf16;
  if (name == "int8") return WeightFormat::kInt8;
  if (name == "int4") return WeightFormat::kInt4;
  throw std::invalid_argument("unknown weight format '" + name + "'; there are: bf16, int8, int4");
}

const Kernels& kernels_of(const std::string& name) {
  for (const Path& path : all_models()) {
    if (path.name == name) return path.kernels();
  }
  std::string known;
  for (const Path& path : all_paths()) {
    if (path.name == name && path.is_runnable) return path.kernels();
    if (path.name == name) {
      throw std::invalid_argument("kernel path '" + name + "' does not run on this processor");
    }
    known += known.empty() ? path.name : std::string(", ") + path.name;
  }
  throw std::invalid_argument("unknown kernel path '" + name + "'; there are: " + known);
}

}  // namespace kvasir
