// A list of tensors that both languages can fill and read.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

namespace at {
class Tensor;
}
namespace tchd {
class Tensors {
 public:
  Tensors();
  explicit Tensors(std::vector<at::Tensor> list);
  ~Tensors();
  std::size_t size() const;
  void push(const at::Tensor& tensor);
  void push_undefined();
  /// A new reference to one of them, which the caller owns; null where it is undefined.
  at::Tensor* get(std::size_t index) const;
  std::vector<at::Tensor>& list() const;

 private:
  std::unique_ptr<std::vector<at::Tensor>> list_;
};
std::unique_ptr<Tensors> new_tensors();
} // namespace tchd
