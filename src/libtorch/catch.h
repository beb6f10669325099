// Included into every bridge's generated code: turns any C++ exception into a message without stack.
#pragma once
#include <c10/util/Exception.h>
#include <exception>

namespace rust {
namespace behavior {
template <typename Try, typename Fail>
static void trycatch(Try&& body, Fail&& fail) noexcept try {
  body();
} catch (const c10::Error& e) {
  fail(e.what_without_backtrace());
} catch (const std::exception& e) {
  fail(e.what());
} catch (...) {
  fail("an exception that is no std::exception");
}
} // namespace behavior
} // namespace rust
