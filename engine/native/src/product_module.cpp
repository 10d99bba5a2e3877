// Bindings for tests: one product by itself, weights packed, multiplied and dropped; the cut of
// threads over memory nodes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "packed_matrix.h"
#include "topology.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvasir {

namespace {

template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// c += a W^T
void multiply(const Matrix<uint16_t>& tensor, const Matrix<float>& a, const Result& c,
              const std::string& isa, const std::string& weights, int num_threads) {
  const int n = static_cast<int>(tensor.shape(0)), k = static_cast<int>(tensor.shape(1));
  const int m = static_cast<int>(a.shape(0));
  if (a.shape(1) != tensor.shape(1) || c.shape(0) != a.shape(0) || c.shape(1) != tensor.shape(0)) {
    throw std::invalid_argument("shapes of a, tensor and c do not fit");
  }
  const nb::gil_scoped_release no_gil;
  const WeightFormat format = weight_format_of(weights);
  const Kernels& kernels = kernels_of(isa);
  ThreadPool pool(num_threads);
  Arena arena(matrix_bytes(format, n, k));
  const std::vector<RowBlock> source = {{tensor.data(), n, {}}};
  const PackedMatrix packed = place(source, k, {}, format, &arena);
  pack(source, k, {}, nullptr, packed, {0, packed.num_panels()}, &pool);
  const size_t scratch_floats = linear_scratch(k);
  const Mapping scratch(scratch_floats * num_threads * sizeof(float));
  const Mapping operand(operand_bytes(kernels, m, k));
  const Compute compute = {&kernels, &pool, static_cast<float*>(scratch.data()), scratch_floats,
                           static_cast<uint8_t*>(operand.data())};
  const Rows rows = {const_cast<float*>(a.data()), a.shape(1)};
  linear(compute, packed, rows, m, {c.data(), c.shape(1)}, Store::kAdd);
}

}  // namespace

void bind_products(nb::module_& m) {
  m.def("multiply", multiply, nb::kw_only(), "tensor"_a.noconvert(), "a"_a.noconvert(),
        "c"_a.noconvert(), "isa"_a, "weights"_a, "num_threads"_a,
        "c += a tensor^T, with the tensor packed in a weight format; for tests.");
  m.def(
      "spread_threads",
      [](const std::string& folder, const Cpus& allowed, int num_threads) {
        return spread_threads(node_cpus(folder), allowed, num_threads);
      },
      nb::kw_only(), "folder"_a, "allowed"_a, "num_threads"_a,
      "The processors of each thread of a pool, none on one node; for tests.");
}

}  // namespace kvasir
