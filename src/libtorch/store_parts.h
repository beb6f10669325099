// What a StoreHandle holds; apart, because its header takes seconds to compile.
#pragma once
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace tchd {
struct StoreParts {
  c10::intrusive_ptr<c10d::Store> store;
  // The same store, where it is a TCPStore.
  c10d::TCPStore* tcp = nullptr;
};
} // namespace tchd
