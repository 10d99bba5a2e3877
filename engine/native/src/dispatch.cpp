#include <stdexcept>

#include "kernels.h"

namespace kvasir {

namespace {

struct Path {
  const char* name;
  bool is_runnable;
  const Kernels& (*kernels)();
};

std::vector<Path> all_paths() {
  std::vector<Path> paths = {{"scalar", true, scalar_kernels}};
#ifdef KVASIR_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  paths.push_back({"avx2", has_avx2, avx2_kernels});
  paths.push_back({"avx512", has_avx512, avx512_kernels});
#endif
  return paths;
}

}  // namespace

std::vector<std::string> runnable_paths() {
  std::vector<std::string> names;
  for (const Path& path : all_paths()) {
    if (path.is_runnable) names.push_back(path.name);
  }
  return names;
}

const Kernels& kernels_of(const std::string& name) {
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
