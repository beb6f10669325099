#include "list.h"

#include <ATen/core/Tensor.h>

namespace tchd {
Tensors::Tensors() : list_(std::make_unique<std::vector<at::Tensor>>()) {}
Tensors::Tensors(std::vector<at::Tensor> list)
    : list_(std::make_unique<std::vector<at::Tensor>>(std::move(list))) {}
Tensors::~Tensors() = default;

std::size_t Tensors::size() const {
  return list_->size();
}
void Tensors::push(const at::Tensor& tensor) {
  list_->push_back(tensor);
}
void Tensors::push_undefined() {
  list_->emplace_back();
}
at::Tensor* Tensors::get(std::size_t index) const {
  const auto& tensor = list_->at(index);
  return tensor.defined() ? new at::Tensor(tensor) : nullptr;
}
std::vector<at::Tensor>& Tensors::list() const {
  return *list_;
}
std::unique_ptr<Tensors> new_tensors() {
  return std::make_unique<Tensors>();
}
} // namespace tchd
