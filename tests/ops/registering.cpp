// An operator library that registers the arguments of its operators; see test_cpp_registry.py.
#include <torch/library.h>

#include "symmem_registry.h"

static at::Tensor twice(const at::Tensor &x, c10::string_view) { return x.add(x); }
static at::Tensor picked(const at::Tensor &x, at::TensorList, c10::string_view, c10::string_view) { return x.clone(); }

TORCH_LIBRARY(cpp_registry, m) {
  m.def("twice(Tensor x, str group_name) -> Tensor");
  m.def("picked(Tensor x, Tensor[] others, str mode, str tp) -> Tensor");
  m.def("picked.named(Tensor x, str group_name) -> Tensor");
  m.def("alone(Tensor(a!) x, str mode) -> ()");
  m.def("wrong(Tensor x, int y, str group_name) -> ()");
  m.def("doubly(Tensor x, str group_name) -> ()");
  m.def("late(Tensor x, str group_name) -> ()");
  symmem::register_symm_mem_args("cpp_registry::twice", {"x"});
  symmem::RegistrationOptions options;
  options.group_arg = "tp";
  options.exit_barrier = true;
  symmem::register_symm_mem_args("cpp_registry::picked", {0, "others"}, options);
  symmem::register_symm_mem_args("cpp_registry::picked.named", {"x"});
  options = {};
  options.default_group = true;
  options.one_sided = true;
  symmem::register_symm_mem_args("cpp_registry::alone", {0}, options);
  symmem::register_symm_mem_args("cpp_registry::wrong", {"y"});
  symmem::register_symm_mem_args("cpp_registry::doubly", {"x"});
  symmem::register_symm_mem_args("cpp_registry::doubly", {0});
  symmem::register_symm_mem_args("cpp_registry::undefined", {"x"});
}

TORCH_LIBRARY_IMPL(cpp_registry, CompositeExplicitAutograd, m) {
  m.impl("twice", twice);
  m.impl("picked", picked);
}
