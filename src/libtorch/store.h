// libtorch's key-value stores, and a store of theirs that is implemented in Rust.
#pragma once
#include <cstdint>
#include <memory>
#include "rust/cxx.h"

namespace tchd {
struct RustStore;
struct StoreParts;

/// One c10d store (a TCPStore: one connection of it). Thread-safe as the store behind it is.
class StoreHandle {
 public:
  explicit StoreHandle(std::unique_ptr<StoreParts> parts);
  ~StoreHandle();
  std::uint16_t port() const;
  void set(rust::Str key, rust::Slice<const std::uint8_t> value) const;
  rust::Vec<std::uint8_t> get(rust::Str key) const;
  std::int64_t add(rust::Str key, std::int64_t amount) const;
  rust::Vec<std::uint8_t> compare_set(
      rust::Str key,
      rust::Slice<const std::uint8_t> expected,
      rust::Slice<const std::uint8_t> desired) const;
  bool check(rust::Slice<const rust::Str> keys) const;
  void wait(rust::Slice<const rust::Str> keys, std::int64_t timeout_ms) const;
  bool remove(rust::Str key) const;
  std::int64_t num_keys() const;
  void append(rust::Str key, rust::Slice<const std::uint8_t> value) const;
  void set_timeout(std::int64_t timeout_ms) const;
  const StoreParts& parts() const;

 private:
  std::unique_ptr<StoreParts> parts_;
};

std::unique_ptr<StoreHandle> share(const StoreHandle& store);
std::unique_ptr<StoreHandle> tcp_store(
    rust::Str host,
    std::uint16_t port,
    bool server,
    std::int64_t workers,
    bool wait_workers,
    bool multi_tenant,
    std::int64_t timeout_ms);
std::unique_ptr<StoreHandle> file_store(rust::Str path, std::int32_t workers);
std::unique_ptr<StoreHandle> rust_store(rust::Box<RustStore> store, std::int64_t timeout_ms);
} // namespace tchd
