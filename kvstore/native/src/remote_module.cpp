#include "remote_module.h"

namespace nb = nanobind;

namespace kvasir {
namespace {

class PythonReader : public RemoteReader {
 public:
  explicit PythonReader(nb::object reads)
      : reads_(std::move(reads)), bytes_max_(nb::cast<size_t>(reads_.attr("bytes_max"))) {}

  size_t bytes_max() const override { return bytes_max_; }

  Code read(const RemotePool& pool, const std::vector<RemotePiece>& pieces, Deadline deadline,
            const Signal* ended, const Take& take) override {
    uint64_t address = 0;
    {
      const nb::gil_scoped_acquire locked;
      nb::list asked;
      for (const RemotePiece& piece : pieces) {
        asked.append(nb::make_tuple(piece.address, piece.bytes));
      }
      const auto is_ended = nb::cpp_function([ended] { return ended->is_raised(); });
      try {
        address = nb::cast<uint64_t>(reads_.attr("read")(
            nb::bytes(pool.agent.data(), pool.agent.size()), asked, deadline.left_ms(), is_ended));
      } catch (nb::python_error& error) {
        error.discard_as_unraisable("a read from afar");
      }
    }
    if (address == 0) {
      if (ended->is_raised()) return Code::kCancelled;
      return deadline.is_past() ? Code::kTimeout : Code::kTransportFailed;
    }
    take(reinterpret_cast<const uint8_t*>(address));
    const nb::gil_scoped_acquire locked;
    reads_.attr("release")(address);
    return Code::kOk;
  }

 private:
  const nb::object reads_;
  const size_t bytes_max_;
};

}  // namespace

std::shared_ptr<RemoteReader> make_remote_reader(const nb::object& reads) {
  return reads.is_none() ? nullptr : std::make_shared<PythonReader>(reads);
}

}  // namespace kvasir
