// Binds the prefix index to Python: checks arguments, nothing else.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "aged_names.h"
#include "prefix_index.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvasir::router {
namespace {

constexpr Py_ssize_t kPiece = 64;  // names of a match that are read at once
constexpr Py_ssize_t kAhead = 8;   // names fetched ahead while they are read

// A list or tuple of 16-byte strings.
class PyNames {
 public:
  explicit PyNames(nb::handle sequence)
      : fast_(nb::steal(PySequence_Fast(sequence.ptr(), "names must be a sequence"))) {
    if (!fast_.is_valid()) nb::raise_python_error();
    size_ = PySequence_Fast_GET_SIZE(fast_.ptr());
    items_ = PySequence_Fast_ITEMS(fast_.ptr());
  }

  Py_ssize_t size() const { return size_; }

  // Names from `start` on, at most `count`; valid until the next call.
  std::span<const Name> read(Py_ssize_t start, Py_ssize_t count) const {
    static thread_local std::vector<Name> names;
    const Py_ssize_t end = std::min(size_, start + count);
    names.clear();
    for (Py_ssize_t i = start; i < end; ++i) {
      if (i + kAhead < size_) __builtin_prefetch(items_[i + kAhead]);
      if (!PyBytes_Check(items_[i]) || PyBytes_GET_SIZE(items_[i]) != kNameBytes) {
        throw std::invalid_argument("a name must be 16 bytes");
      }
      names.push_back(load_name(PyBytes_AS_STRING(items_[i])));
    }
    return names;
  }

  std::span<const Name> read_all() const { return read(0, size_); }

 private:
  nb::object fast_;
  Py_ssize_t size_;
  PyObject** items_;
};

nb::list to_bytes(const std::vector<Name>& names) {
  nb::list out;
  for (const Name& name : names) out.append(nb::bytes(&name, kNameBytes));
  return out;
}

uint32_t to_seat(const PrefixIndex& index, uint32_t seat) {
  if (!index.is_taken(seat)) throw nb::index_error("nobody has this seat");
  return seat;
}

// Runs by worker: the longest of all, longest first, then the wanted ones.
nb::dict match(PrefixIndex& index, nb::handle names, const nb::tuple& wanted, const nb::dict& seats,
               const nb::list& workers, uint32_t num_longest) {
  static thread_local std::vector<uint32_t> wanted_seats, runs;
  static thread_local std::vector<Run> longest;
  wanted_seats.clear();
  for (const nb::handle worker : wanted) {
    PyObject* const seat = PyDict_GetItemWithError(seats.ptr(), worker.ptr());
    wanted_seats.push_back(seat ? nb::cast<uint32_t>(nb::handle(seat)) : kNone);
  }
  const PyNames source(names);
  index.begin_match(wanted_seats, num_longest);
  for (Py_ssize_t at = 0; at < source.size() && index.walk(source.read(at, kPiece)); at += kPiece) {
  }
  index.end_match(runs, longest);
  nb::dict out;
  for (const Run& run : longest) out[workers[run.seat]] = run.num_blocks;
  for (size_t i = 0; i < runs.size(); ++i) out[wanted[i]] = runs[i];
  return out;
}

void bind_index(nb::module_& m) {
  nb::class_<PrefixIndex>(m, "PrefixIndex")
      .def(
          "__init__",
          [](PrefixIndex* self, int64_t blocks_max) {
            if (blocks_max < 1 || blocks_max >= kNone) {
              throw std::invalid_argument("blocks_max must be from 1 to 2**32 - 2");
            }
            new (self) PrefixIndex(static_cast<uint32_t>(blocks_max));
          },
          nb::kw_only(), "blocks_max"_a)
      .def("take_seat",
           [](PrefixIndex& self) {
             try {
               return self.take_seat();
             } catch (const std::length_error& error) {
               throw nb::value_error(error.what());
             }
           })
      .def("give_up_seat",
           [](PrefixIndex& self, uint32_t seat) { self.give_up_seat(to_seat(self, seat)); })
      .def("store",
           [](PrefixIndex& self, uint32_t seat, nb::handle names) {
             self.store(to_seat(self, seat), PyNames(names).read_all());
           })
      .def("remove",
           [](PrefixIndex& self, uint32_t seat, nb::handle names) {
             self.remove(to_seat(self, seat), PyNames(names).read_all());
           })
      .def("match", &match)
      .def("num_blocks", [](const PrefixIndex& self,
                            uint32_t seat) { return self.num_blocks(to_seat(self, seat)); })
      .def_prop_ro("num_bytes", &PrefixIndex::num_bytes)
      .def("__len__", &PrefixIndex::size);
}

void bind_aged(nb::module_& m) {
  nb::class_<AgedNames>(m, "AgedNames")
      .def(nb::init<>())
      .def(
          "use",
          [](AgedNames& self, nb::handle names, int64_t now_ms, uint32_t num_names_max) {
            std::vector<Name> gone;
            self.use(PyNames(names).read_all(), now_ms, num_names_max, gone);
            return to_bytes(gone);
          },
          "names"_a, nb::kw_only(), "now_ms"_a, "num_names_max"_a)
      .def(
          "drop_before",
          [](AgedNames& self, int64_t since_ms) {
            std::vector<Name> gone;
            self.drop_before(since_ms, gone);
            return to_bytes(gone);
          },
          nb::kw_only(), "since_ms"_a)
      .def_prop_ro("num_bytes", &AgedNames::num_bytes)
      .def("__len__", &AgedNames::size);
}

}  // namespace

NB_MODULE(_native, m) {
  bind_index(m);
  bind_aged(m);
}

}  // namespace kvasir::router
