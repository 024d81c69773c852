// Kernels of the collective operators for CUDA tensors: they repeat an earlier call without Python (eager.c), or else
// call the kernel in Python.
//
// symmem/native compiles this file for the installed torch and loads it with ctypes. symmem/ops/eager.py registers the
// kernels at two levels: for the Autograd key, and for the device's own key, which calls in inference mode and calls
// below Autograd reach. The dispatcher has handled modes, tracing, profilers and wrapped tensors before. Only the
// tensors remain to be checked.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

extern "C" {
#include "eager.h"
}

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

std::atomic<Repeat> repeat{nullptr};

// The dtype as in DLPack; no code for dtypes that are not repeated here.
bool set_dtype(Shape& shape, c10::ScalarType type) {
  enum { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4, COMPLEX = 5, BOOL = 6 };
  switch (type) {
    case c10::ScalarType::Byte:
    case c10::ScalarType::UInt16:
    case c10::ScalarType::UInt32:
    case c10::ScalarType::UInt64:
      shape.code = UINT;
      break;
    case c10::ScalarType::Char:
    case c10::ScalarType::Short:
    case c10::ScalarType::Int:
    case c10::ScalarType::Long:
      shape.code = INT;
      break;
    case c10::ScalarType::Half:
    case c10::ScalarType::Float:
    case c10::ScalarType::Double:
      shape.code = FLOAT;
      break;
    case c10::ScalarType::BFloat16:
      shape.code = BFLOAT;
      break;
    case c10::ScalarType::ComplexHalf:
    case c10::ScalarType::ComplexFloat:
    case c10::ScalarType::ComplexDouble:
      shape.code = COMPLEX;
      break;
    case c10::ScalarType::Bool:
      shape.code = BOOL;
      break;
    default:
      return false;
  }
  shape.bits = static_cast<uint16_t>(8 * c10::elementSize(type));
  return true;
}

// The address of a tensor in contiguous plain memory; null for any other tensor.
void* read(const at::Tensor& tensor, Shape& shape) {
  if (!tensor.defined() || tensor.layout() != c10::kStrided || tensor.dim() > MOST_DIMS || !tensor.is_contiguous() ||
      tensor.is_conj() || tensor.is_neg() || tensor._is_zerotensor() || !tensor.has_storage())
    return nullptr;
  shape = {};
  if (!set_dtype(shape, tensor.scalar_type())) return nullptr;
  shape.ndim = static_cast<int32_t>(tensor.dim());
  std::copy(tensor.sizes().begin(), tensor.sizes().end(), shape.shape);
  auto* begin = static_cast<char*>(tensor.storage().unsafeGetStorageImpl()->mutable_data());
  return begin ? begin + tensor.storage_offset() * tensor.element_size() : nullptr;
}

struct Call : Request {
  const at::Tensor* tensor = nullptr;  // x
  at::Tensor result;
};

// The lock of the interpreter is not held here: torch's allocator may call Python.
void* allocate(Request* request, const Shape* shape) {
  auto& call = *static_cast<Call*>(request);
  try {
    call.result = call.tensor->new_empty({shape->shape, static_cast<size_t>(shape->ndim)});
    Shape made;
    void* target = read(call.result, made);
    return target && !std::memcmp(&made, shape, sizeof made) ? target : nullptr;
  } catch (const std::exception&) {
    return nullptr;  // Python fails in the same way, and reports it to the other ranks
  }
}

// A string argument; null if it is no string of C.
const char* text(const c10::IValue& value) {
  if (!value.isString()) return nullptr;
  const auto& all = value.toStringRef();
  return all.find('\0') == all.npos ? all.c_str() : nullptr;
}

class Repeated : public c10::OperatorKernel {
 public:
  Repeated(void* kind, uint32_t form, bool has_option, DispatchKeySet keys, c10::SafeKernelFunction otherwise)
      : kind_(kind), form_(form), has_option_(has_option), keys_(keys), otherwise_(std::move(otherwise)) {}

  // The stack holds x, the option if there is one, the name of the group, and perhaps out.
  void operator()(const c10::OperatorHandle& op, DispatchKeySet keys, c10::Stack* stack) {
    Call call;
    if (!is_repeated(keys, *stack, call)) return otherwise_.callBoxed(op, keys, stack);
    stack->resize(stack->size() - count());
    if (form_ == NEW) stack->emplace_back(std::move(call.result));
  }

 private:
  void* kind_;
  uint32_t form_;
  bool has_option_;
  DispatchKeySet keys_;  // of an ordinary call, at the level of Autograd; else empty
  c10::SafeKernelFunction otherwise_;

  size_t count() const { return 2 + has_option_ + (form_ == OTHER); }

  bool is_repeated(DispatchKeySet keys, const c10::Stack& stack, Call& call) const {
    const auto run = repeat.load(std::memory_order_acquire);
    if (!run) return false;
    const auto* arguments = &stack[stack.size() - count()];
    const auto& x = arguments[0].toTensor();
    const auto& out = form_ == OTHER ? arguments[count() - 1].toTensor() : x;
    if (!keys_.empty() && (keys != keys_ || has_derivative(x) || (form_ == OTHER && has_derivative(out)))) return false;
    void* const source = read(x, call.x);
    if (!source) return false;
    if (form_ != NEW && out.is_inference() && !c10::InferenceMode::is_enabled()) return false;
    call.kind = kind_;
    call.form = form_;
    call.option = has_option_ ? text(arguments[1]) : nullptr;
    call.root = has_option_ && arguments[1].isInt() ? arguments[1].toInt() : -1;
    call.group = text(arguments[1 + has_option_]);
    if (!call.group || (has_option_ && !call.option && call.root < 0)) return false;
    call.ordinal = std::max<int32_t>(x.device().index(), 0);
    call.source = source;
    call.target = source;
    if (form_ == OTHER) {
      call.target = read(out, call.out);
      if (!call.target || out.device() != x.device()) return false;
    }
    call.tensor = &x;
    call.allocate = allocate;
    if (!run(&call)) return false;
    if (form_ != NEW && !out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
    return true;
  }

  static bool has_derivative(const at::Tensor& tensor) {
    return (tensor.requires_grad() && c10::GradMode::is_enabled()) || tensor._fw_grad(0).defined();
  }
};

void add(
    const c10::OperatorHandle& op, DispatchKey key, void* kind, uint32_t form, bool has_option, DispatchKeySet keys) {
  auto kernel = c10::KernelFunction::makeFromBoxedFunctor(
      std::make_unique<Repeated>(kind, form, has_option, keys, op.getComputedKernelForDispatchKey(key)));
  // It stays until the process ends, as the libraries of torch do.
  new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().registerImpl(
      op.operator_name(), key, std::move(kernel), std::nullopt, nullptr, "symmem/native/operators.cpp"));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Register the kernels of a form of an operator. `kind` is the object that Python gives to eager.c, kept alive.
EXPORT int symmem_register(const char* name, void* kind, unsigned form, int has_option) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!op) return 1;
  const auto keys = DispatchKeySet(DispatchKey::CUDA) | DispatchKeySet(DispatchKey::AutogradCUDA);
  add(*op, DispatchKey::AutogradCUDA, kind, form, has_option, keys);
  add(*op, DispatchKey::CUDA, kind, form, has_option, {});
  return 0;
}

// From now on repeat calls by this function of eager.c; by none if it is null.
EXPORT void symmem_use(Repeat function) { repeat.store(function, std::memory_order_release); }
