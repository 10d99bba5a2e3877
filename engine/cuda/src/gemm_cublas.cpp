// cuBLAS, loaded when it is first needed: the build asks for no CUDA library, and PyPI's wheel
// (nvidia-cublas) or an installed CUDA serves. The declarations below are of its stable C
// interface.
#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "gemm.h"

namespace kvasir::cuda {

namespace {

using Handle = void*;
constexpr int kTransposed = 1, kPlain = 0;   // cublasOperation_t
constexpr int kBfloat16 = 14, kFloat32 = 0;  // cudaDataType_t
constexpr int kComputeFloat32 = 68;          // cublasComputeType_t
constexpr int kDefaultAlgorithm = -1;        // cublasGemmAlgo_t
constexpr const char* kNames[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};
constexpr const char* kPathVariable = "KVASIR_CUBLAS";

void* open_library() {
  const char* path = std::getenv(kPathVariable);
  if (path != nullptr) {
    if (void* library = dlopen(path, RTLD_NOW)) return library;
  }
  for (const char* name : kNames) {
    if (void* library = dlopen(name, RTLD_NOW)) return library;
  }
  throw std::runtime_error(std::string("cuBLAS is not to be found (") + dlerror() +
                           "): install nvidia-cublas, or set " + kPathVariable +
                           " to the path of libcublas.so");
}

void require(int status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(std::string(what) + ": cuBLAS status " + std::to_string(status));
  }
}

}  // namespace

struct Gemm::Library {
  int (*create)(Handle*);
  int (*destroy)(Handle);
  int (*set_stream)(Handle, cudaStream_t);
  int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int,
              int, const void*, void*, int, int, int, int);
  Handle handle = nullptr;
};

Gemm::Gemm(cudaStream_t stream) : library_(nullptr) {
  void* library = open_library();
  const auto find = [&](auto* function, const char* name) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
    if (*function == nullptr) throw std::runtime_error(std::string("cuBLAS lacks ") + name);
  };
  Library found{};
  find(&found.create, "cublasCreate_v2");
  find(&found.destroy, "cublasDestroy_v2");
  find(&found.set_stream, "cublasSetStream_v2");
  find(&found.gemm, "cublasGemmEx");
  require(found.create(&found.handle), "starting cuBLAS");
  require(found.set_stream(found.handle, stream), "giving cuBLAS a stream");
  library_ = new Library(found);
}

Gemm::~Gemm() {
  if (library_ == nullptr) return;
  library_->destroy(library_->handle);
  delete library_;
}

void Gemm::multiply(const uint16_t* a, const uint16_t* w, int rows, int n, int k, bool adds,
                    float* c) {
  const float one = 1, kept = adds ? 1 : 0;
  for (int row = 0; row < rows; row += kTileRows) {
    // cuBLAS counts by columns: what it sees is c^T = w a^T.
    require(library_->gemm(library_->handle, kTransposed, kPlain, n, kTileRows, k, &one, w,
                           kBfloat16, k, a + static_cast<size_t>(row) * k, kBfloat16, k, &kept,
                           c + static_cast<size_t>(row) * n, kFloat32, n, kComputeFloat32,
                           kDefaultAlgorithm),
            "a matrix product");
  }
}

}  // namespace kvasir::cuda
