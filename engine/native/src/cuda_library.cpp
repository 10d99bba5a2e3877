#include "cuda_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>

namespace kvasir {

namespace {

constexpr const char* kPathVariable = "KVASIR_CUDA_LIBRARY";
constexpr const char* kFileName = "libkvasir_cuda.so";
constexpr const char* kEntry = "kvasir_cuda_model";

using Entry = Device* (*)(const ModelShape*, const TensorMap*, const Progress*, std::string*);

// Beside this module, unless the variable says otherwise.
std::string library_path() {
  const char* path = std::getenv(kPathVariable);
  if (path != nullptr) return path;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&load_cuda_model), &info) == 0) return kFileName;
  return std::filesystem::path(info.dli_fname).replace_filename(kFileName);
}

}  // namespace

std::unique_ptr<Device> load_cuda_model(const ModelShape& shape, const TensorMap& tensors,
                                        const Progress& progress) {
  void* library = dlopen(library_path().c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::invalid_argument(std::string("the CUDA device cannot be loaded: ") + dlerror() +
                                "; `make cuda` builds it, " + kPathVariable + " says where it is");
  }
  const auto entry = reinterpret_cast<Entry>(dlsym(library, kEntry));
  if (entry == nullptr)
    throw std::invalid_argument(library_path() + " is no CUDA device of Kvasir");
  std::string why;
  std::unique_ptr<Device> model(entry(&shape, &tensors, &progress, &why));
  if (model == nullptr) throw std::invalid_argument("the CUDA device refuses the model: " + why);
  return model;
}

}  // namespace kvasir
