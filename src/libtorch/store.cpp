#include "tch-distributed/src/libtorch/store.rs.h"

#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include "store_parts.h"

namespace tchd {
namespace {
using Bytes = std::vector<std::uint8_t>;
using std::chrono::milliseconds;

Bytes bytes(rust::Slice<const std::uint8_t> value) {
  return Bytes(value.begin(), value.end());
}

rust::Vec<std::uint8_t> to_rust(const Bytes& value) {
  rust::Vec<std::uint8_t> out;
  out.reserve(value.size());
  for (auto byte : value) {
    out.push_back(byte);
  }
  return out;
}

std::vector<std::string> strings(rust::Slice<const rust::Str> keys) {
  std::vector<std::string> out;
  out.reserve(keys.size());
  for (const auto& key : keys) {
    out.emplace_back(key.data(), key.size());
  }
  return out;
}

rust::Slice<const std::uint8_t> slice(const Bytes& value) {
  return {value.data(), value.size()};
}

// The other way round: libtorch calls, Rust answers. Its timeout is its own, so that a group which
// changes it changes nobody else's.
class RustBackedStore : public c10d::Store {
 public:
  RustBackedStore(rust::Box<RustStore> store, milliseconds timeout)
      : c10d::Store(timeout), store_(std::move(store)) {}

  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::intrusive_ptr<c10d::Store>::unsafe_reclaim_from_nonowning(this);
  }
  void set(const std::string& key, const Bytes& value) override {
    typed([&] { rust_store_set(*store_, key, slice(value)); });
  }
  Bytes get(const std::string& key) override {
    return typed([&] {
      auto value = rust_store_get(*store_, key, timeout_.count());
      return Bytes(value.begin(), value.end());
    });
  }
  std::int64_t add(const std::string& key, std::int64_t amount) override {
    return typed([&] { return rust_store_add(*store_, key, amount); });
  }
  Bytes compareSet(const std::string& key, const Bytes& expected, const Bytes& desired) override {
    return typed([&] {
      auto value = rust_store_compare_set(*store_, key, slice(expected), slice(desired));
      return Bytes(value.begin(), value.end());
    });
  }
  bool check(const std::vector<std::string>& keys) override {
    return typed([&] { return rust_store_check(*store_, keys); });
  }
  void wait(const std::vector<std::string>& keys) override {
    wait(keys, timeout_);
  }
  void wait(const std::vector<std::string>& keys, const milliseconds& timeout) override {
    typed([&] { rust_store_wait(*store_, keys, timeout.count()); });
  }
  bool deleteKey(const std::string& key) override {
    return typed([&] { return rust_store_delete(*store_, key); });
  }
  std::int64_t getNumKeys() override {
    return typed([&] { return rust_store_num_keys(*store_); });
  }
  void append(const std::string& key, const Bytes& value) override {
    typed([&] { rust_store_append(*store_, key, slice(value)); });
  }
  std::vector<Bytes> multiGet(const std::vector<std::string>& keys) override {
    std::vector<Bytes> out;
    for (const auto& key : keys) {
      out.push_back(get(key));
    }
    return out;
  }
  void multiSet(const std::vector<std::string>& keys, const std::vector<Bytes>& values) override {
    for (std::size_t i = 0; i < keys.size(); ++i) {
      set(keys[i], values[i]);
    }
  }
  bool hasExtendedApi() const override {
    return true;
  }

 private:
  // Errors from Rust become the exception that c10d's own stores throw.
  template <typename F>
  static auto typed(F&& body) -> decltype(body()) {
    try {
      return body();
    } catch (const rust::Error& e) {
      C10_THROW_ERROR(DistStoreError, e.what());
    }
  }

  rust::Box<RustStore> store_;
};

std::unique_ptr<StoreHandle> handle(c10::intrusive_ptr<c10d::Store> store) {
  auto parts = std::make_unique<StoreParts>();
  parts->tcp = dynamic_cast<c10d::TCPStore*>(store.get());
  parts->store = std::move(store);
  return std::make_unique<StoreHandle>(std::move(parts));
}
} // namespace

StoreHandle::StoreHandle(std::unique_ptr<StoreParts> parts) : parts_(std::move(parts)) {}
StoreHandle::~StoreHandle() = default;

const StoreParts& StoreHandle::parts() const {
  return *parts_;
}
std::uint16_t StoreHandle::port() const {
  return parts_->tcp ? parts_->tcp->getPort() : 0;
}
void StoreHandle::set(rust::Str key, rust::Slice<const std::uint8_t> value) const {
  parts_->store->set(std::string(key), bytes(value));
}
rust::Vec<std::uint8_t> StoreHandle::get(rust::Str key) const {
  return to_rust(parts_->store->get(std::string(key)));
}
std::int64_t StoreHandle::add(rust::Str key, std::int64_t amount) const {
  return parts_->store->add(std::string(key), amount);
}
rust::Vec<std::uint8_t> StoreHandle::compare_set(
    rust::Str key,
    rust::Slice<const std::uint8_t> expected,
    rust::Slice<const std::uint8_t> desired) const {
  return to_rust(parts_->store->compareSet(std::string(key), bytes(expected), bytes(desired)));
}
bool StoreHandle::check(rust::Slice<const rust::Str> keys) const {
  return parts_->store->check(strings(keys));
}
void StoreHandle::wait(rust::Slice<const rust::Str> keys, std::int64_t timeout_ms) const {
  parts_->store->wait(strings(keys), milliseconds(timeout_ms));
}
bool StoreHandle::remove(rust::Str key) const {
  auto& store = *parts_->store;
  // FileStore says true whether the key was there or not.
  bool there = dynamic_cast<c10d::FileStore*>(&store) == nullptr || store.check({std::string(key)});
  return there && store.deleteKey(std::string(key));
}
std::int64_t StoreHandle::num_keys() const {
  return parts_->store->getNumKeys();
}
void StoreHandle::append(rust::Str key, rust::Slice<const std::uint8_t> value) const {
  parts_->store->append(std::string(key), bytes(value));
}
void StoreHandle::set_timeout(std::int64_t timeout_ms) const {
  parts_->store->setTimeout(milliseconds(timeout_ms));
}

std::unique_ptr<StoreHandle> share(const StoreHandle& store) {
  return std::make_unique<StoreHandle>(std::make_unique<StoreParts>(store.parts()));
}

std::unique_ptr<StoreHandle> tcp_store(
    rust::Str host,
    std::uint16_t port,
    bool server,
    std::int64_t workers,
    bool wait_workers,
    bool multi_tenant,
    std::int64_t timeout_ms) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.isServer = server;
  if (workers >= 0) {
    options.numWorkers = static_cast<std::size_t>(workers);
  }
  options.waitWorkers = wait_workers;
  options.multiTenant = multi_tenant;
  options.timeout = milliseconds(timeout_ms);
  return handle(c10::make_intrusive<c10d::TCPStore>(std::string(host), options));
}

std::unique_ptr<StoreHandle> file_store(rust::Str path, std::int32_t workers) {
  return handle(c10::make_intrusive<c10d::FileStore>(std::string(path), workers));
}

std::unique_ptr<StoreHandle> rust_store(rust::Box<RustStore> store, std::int64_t timeout_ms) {
  return handle(c10::make_intrusive<RustBackedStore>(std::move(store), milliseconds(timeout_ms)));
}
} // namespace tchd
