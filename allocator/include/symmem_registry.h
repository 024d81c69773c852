// Say in a C++ operator library which arguments of its operators must be in symmetric memory.
//
//   #include <torch/library.h>
//   #include "symmem_registry.h"
//
//   TORCH_LIBRARY(lib, m) {
//     m.def("op(Tensor x, Tensor(a!)[] outs, str group_name) -> ()");
//     symmem::register_symm_mem_args("lib::op", {"x", 1});  // by name or by position
//   }
//
// It does the same as symmem.register_symm_mem_args in Python, as soon as the library is loaded: by
// torch.ops.load_library, by `import`, or by dlopen; before or after symmem itself. The library needs neither symmem nor
// Python, only PyTorch's headers and C++17. Compile it with -I$(symmem include-path).
//
// How it works. The dispatcher of PyTorch is the one table that C++ libraries and Python share. A registration becomes
// an operator without a kernel, symmem_registry::registration.n0, .n1 and so on. The defaults of its arguments are the
// record, and symmem reads every number once. A registration that does not fit the operator (no such argument, or no
// tensor) is an InvalidArgumentError in Python where symmem looks up that operator. It names the line of the C++ code.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace symmem {

// An argument of an operator: its name, or its position from 0.
struct Argument {
  std::string text;
  Argument(const char *name) : text(name) {}
  Argument(std::string name) : text(std::move(name)) {}
  Argument(int position) : text(std::to_string(position)) {}
};

// See symmem.register_symm_mem_args.
struct RegistrationOptions {
  std::string group_arg;       // the argument that carries the group; empty if the schema shows it
  bool default_group = false;  // the operator uses the default process group
  bool exit_barrier = false;   // peers have finished with these arguments when the operator completes on its stream
  bool one_sided = false;      // a single rank calls the operator, for a peer's memory
};

// Register the arguments of "namespace::name" or "namespace::name.overload". Local: do the same on all ranks. Call it
// once per operator, usually in TORCH_LIBRARY. The operator may be defined later.
inline void register_symm_mem_args(
    const std::string &op,
    const std::vector<Argument> &arguments,
    const RegistrationOptions &options = {},
    const char *file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  const auto quoted = [](const std::string &text) {
    std::string safe = text;
    for (char &each : safe)
      if (each == '"' || each == '\\' || each < ' ') each = '?';
    return '"' + safe + '"';
  };
  const auto flag = [](bool value) { return value ? "True" : "False"; };
  std::string names;
  for (const Argument &each : arguments) names += (names.empty() ? "" : ",") + each.text;
  const char *const record = "symmem_registry::registration";
  std::string number;
  for (int count = 0;; ++count) {
    number = "n" + std::to_string(count);
    if (!c10::Dispatcher::singleton().findSchema({record, number})) break;
  }
  // Never freed: the record must outlive static objects, whichever library goes first.
  auto *library = new torch::Library(
      torch::Library::FRAGMENT, "symmem_registry", std::nullopt, file, static_cast<uint32_t>(line));
  const std::string schema =
      "registration." + number + "(str op=" + quoted(op) + ", str args=" + quoted(names) +
      ", str group_arg=" + quoted(options.group_arg) + ", bool default_group=" + flag(options.default_group) +
      ", bool exit_barrier=" + flag(options.exit_barrier) + ", bool one_sided=" + flag(options.one_sided) +
      ", str source=" + quoted(std::string(file) + ":" + std::to_string(line)) + ") -> ()";
  library->def(schema.c_str());
}

}  // namespace symmem
