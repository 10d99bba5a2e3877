#include "pool.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "futex.h"

namespace kvasir {
namespace {

constexpr size_t kLine = 128;  // two cache lines: the prefetcher takes them in pairs
constexpr size_t kHugePage = 2 << 20;
constexpr size_t kClosedMax = 1024;
constexpr uint64_t kKnown = uint64_t{1} << 32;  // beside a checksum

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

size_t words_bytes(const PoolShape& shape) {
  return round_up(size_t{shape.num_blocks} * sizeof(uint32_t), kLine);
}

}  // namespace

size_t PoolShape::shared_data_offset() const {
  return round_up(Directory::bytes(num_blocks), kHugePage);
}

BlockPool::BlockPool(const PoolShape& shape, bool is_shared)
    : shape_(shape),
      memory_(is_shared ? Mapping::make_shared(shape.shared_bytes(), descriptor_)
                        : Mapping::make_private(shape.data_bytes(), true)),
      data_(memory_.data() + (is_shared ? shape.shared_data_offset() : 0)),
      checksums_(Mapping::make_private(
          size_t{shape.num_blocks} * shape.num_layers * sizeof(uint64_t), false)),
      counters_(Mapping::make_private(2 * words_bytes(shape) + kLine, false)) {
  if (is_shared) directory_.emplace(memory_.data(), shape.num_blocks);
}

uint32_t* BlockPool::progress() const {
  return reinterpret_cast<uint32_t*>(counters_.data() + 2 * words_bytes(shape_));
}

uint32_t* BlockPool::uses() const {
  return reinterpret_cast<uint32_t*>(counters_.data() + words_bytes(shape_));
}

uint8_t* BlockPool::layer(uint32_t block, uint32_t layer) const {
  return data() + block * shape_.block_bytes() + size_t{layer} * shape_.layer_bytes;
}

uint32_t BlockPool::ready_layers(uint32_t block) const {
  return std::atomic_ref<uint32_t>(ready()[block]).load(std::memory_order_acquire);
}

void BlockPool::raise_ready(uint32_t block, uint32_t layers) {
  std::atomic_ref<uint32_t>(ready()[block]).store(layers, std::memory_order_release);
  wake();
}

void BlockPool::wake() { futex_bump(progress()); }

void BlockPool::check_block(uint32_t block) const {
  if (block >= shape_.num_blocks) {
    throw std::out_of_range("block " + std::to_string(block) + " of a pool of " +
                            std::to_string(shape_.num_blocks));
  }
}

void BlockPool::reset(uint32_t block) {
  check_block(block);
  const std::lock_guard lock(mutex_);
  if (published_.contains(block)) {
    throw std::invalid_argument("block " + std::to_string(block) + " is still published");
  }
  std::atomic_ref<uint32_t>(ready()[block]).store(0, std::memory_order_release);
}

bool BlockPool::publish(const Name& name, uint32_t block) {
  check_block(block);
  const std::lock_guard lock(mutex_);
  if (ready_layers(block) != shape_.num_layers) {
    throw std::invalid_argument("block " + std::to_string(block) + " is not whole");
  }
  if (const auto it = names_.find(name); it != names_.end()) return it->second.block == block;
  if (published_.contains(block)) {
    throw std::invalid_argument("block " + std::to_string(block) + " has another name");
  }
  names_.emplace(name, Entry{.block = block, .pins = 0});
  published_.emplace(block, name);
  if (directory_) directory_->add(name, block);
  return true;
}

bool BlockPool::unpublish(const Name& name) {
  const std::lock_guard lock(mutex_);
  const auto it = names_.find(name);
  if (it == names_.end()) return true;
  if (it->second.pins > 0) return false;
  if (directory_) directory_->remove(it->second.block);
  for (uint32_t layer = 0; layer < shape_.num_layers; ++layer) {
    checksum(it->second.block, layer) = 0;
  }
  published_.erase(it->second.block);
  names_.erase(it);
  return true;
}

std::optional<uint32_t> BlockPool::lookup(const Name& name) const {
  const std::lock_guard lock(mutex_);
  const auto it = names_.find(name);
  return it == names_.end() ? std::nullopt : std::optional(it->second.block);
}

size_t BlockPool::num_published() const {
  const std::lock_guard lock(mutex_);
  return names_.size();
}

std::optional<uint32_t> BlockPool::pin(const Name& name) {
  const std::lock_guard lock(mutex_);
  const auto it = names_.find(name);
  if (it == names_.end()) return std::nullopt;
  ++it->second.pins;
  return it->second.block;
}

bool BlockPool::count_use(const Name& name) {
  const std::lock_guard lock(mutex_);
  const auto it = names_.find(name);
  if (it == names_.end()) return false;
  std::atomic_ref<uint32_t>(uses()[it->second.block]).fetch_add(1, std::memory_order_relaxed);
  return true;
}

void BlockPool::unpin(const Name& name) {
  const std::lock_guard lock(mutex_);
  --names_.at(name).pins;
}

uint64_t& BlockPool::checksum(uint32_t block, uint32_t layer_first) const {
  return reinterpret_cast<uint64_t*>(
      checksums_.data())[size_t{block} * shape_.num_layers + layer_first];
}

std::optional<uint32_t> BlockPool::frame_checksum(uint32_t block, uint32_t layer_first) const {
  const uint64_t kept =
      std::atomic_ref<uint64_t>(checksum(block, layer_first)).load(std::memory_order_relaxed);
  return (kept & kKnown) != 0 ? std::optional(static_cast<uint32_t>(kept)) : std::nullopt;
}

void BlockPool::keep_frame_checksum(uint32_t block, uint32_t layer_first, uint32_t value) {
  std::atomic_ref<uint64_t>(checksum(block, layer_first))
      .store(kKnown | value, std::memory_order_relaxed);
}

void BlockPool::share_checksum(uint32_t block, uint32_t checksum) {
  const std::lock_guard lock(mutex_);
  directory_->set_checksum(block, checksum);
}

BlockPool::Session& BlockPool::session(uint64_t id) {
  const auto it = sessions_.find(id);
  if (it == sessions_.end()) throw std::invalid_argument("no session " + std::to_string(id));
  return it->second;
}

void BlockPool::open_session(uint64_t id) {
  {
    const std::lock_guard lock(mutex_);
    if (!sessions_.try_emplace(id).second) {
      throw std::invalid_argument("session " + std::to_string(id) + " is already open");
    }
    std::erase(closed_, id);
  }
  wake();
}

void BlockPool::extend_session(uint64_t id, const std::vector<uint32_t>& blocks) {
  for (const uint32_t block : blocks) check_block(block);
  {
    const std::lock_guard lock(mutex_);
    Session& target = session(id);
    if (target.status == SessionStatus::kFinished) {
      throw std::invalid_argument("session " + std::to_string(id) + " is finished");
    }
    target.blocks.insert(target.blocks.end(), blocks.begin(), blocks.end());
  }
  wake();
}

void BlockPool::finish_session(uint64_t id) {
  {
    const std::lock_guard lock(mutex_);
    Session& target = session(id);
    if (target.status == SessionStatus::kOpen) target.status = SessionStatus::kFinished;
  }
  wake();
}

void BlockPool::abort_session(uint64_t id) {
  {
    const std::lock_guard lock(mutex_);
    session(id).status = SessionStatus::kAborted;
  }
  wake();
}

bool BlockPool::session_pulled(uint64_t id) const {
  const std::lock_guard lock(mutex_);
  const auto it = sessions_.find(id);
  return it != sessions_.end() && it->second.pulled;
}

bool BlockPool::close_session(uint64_t id) {
  const std::lock_guard lock(mutex_);
  const auto it = sessions_.find(id);
  if (it == sessions_.end()) return true;
  if (it->second.readers > 0) return false;
  sessions_.erase(it);
  closed_.push_back(id);
  if (closed_.size() > kClosedMax) closed_.pop_front();
  return true;
}

size_t BlockPool::num_sessions() const {
  const std::lock_guard lock(mutex_);
  return sessions_.size();
}

BlockPool::SessionStatus BlockPool::begin_read(uint64_t id) {
  const std::lock_guard lock(mutex_);
  const auto it = sessions_.find(id);
  if (it == sessions_.end()) {
    const bool closed = std::find(closed_.begin(), closed_.end(), id) != closed_.end();
    return closed ? SessionStatus::kAborted : SessionStatus::kUnknown;
  }
  if (it->second.status != SessionStatus::kAborted) ++it->second.readers;
  return it->second.status;
}

BlockPool::SessionStatus BlockPool::read_session(uint64_t id, std::vector<uint32_t>& blocks) const {
  const std::lock_guard lock(mutex_);
  const Session& source = sessions_.at(id);
  blocks.insert(blocks.end(), source.blocks.begin() + static_cast<ptrdiff_t>(blocks.size()),
                source.blocks.end());
  return source.status;
}

void BlockPool::end_read(uint64_t id, bool acknowledged) {
  const std::lock_guard lock(mutex_);
  Session& source = sessions_.at(id);
  --source.readers;
  if (acknowledged) source.pulled = true;
}

}  // namespace kvasir
