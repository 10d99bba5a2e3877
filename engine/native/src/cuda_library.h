// The CUDA device, in a library of its own that is loaded when somebody asks for it.
#pragma once

#include <memory>

#include "device.h"

namespace kvasir {

inline constexpr const char* kCudaPath = "cuda";

// Throws std::invalid_argument if the library is missing, finds no device or refuses the model.
std::unique_ptr<Device> load_cuda_model(const ModelShape& shape, const TensorMap& tensors,
                                        const Progress& progress);

}  // namespace kvasir
