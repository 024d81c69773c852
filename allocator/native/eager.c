// Eager calls of the collective operators on CUDA, repeated without Python. If a call differs from an earlier call only
// in the addresses of its tensors, it is one kernel launch with the same arguments, except for two addresses.
//
// Python makes the first call of a kind, checks shapes, dtypes and options, and stores the launch here (Calls.add). A
// repeated call checks what may change from call to call. Nothing may intercept the call (modes, gradients, a profiler,
// a capture). Group and device must be unchanged. The tensors must be plain memory and must not overlap. If a check
// fails, run() does nothing and returns None, and Python makes the call.
//
// A predicate returns 0 for "no", and also if it fails. Then an exception is set, and run() raises it. It may be a
// KeyboardInterrupt, wherever Python code runs. Errors of torch's own C functions just mean "no".
//
// The DLPack C exchange API reads tensors and returns the current stream. It is torch's table of C functions for this
// purpose (dlpack.h 1.3; torch.Tensor.__dlpack_c_exchange_api__). For tensors without memory, such as fake, batched and
// functional tensors, it returns an error or no address.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "eager.h"

// From the DLPack C exchange API, version 1.

typedef struct {
  int32_t type, ordinal;
} Device;

typedef struct {
  void *data;
  Device device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  uint32_t major, minor;
  const void *previous;
  const void *allocate, *export, *import;
  int (*read)(void *object, Tensor *out);
  int (*stream)(int32_t type, int32_t ordinal, void **out);
} Exchange;

// From the CUDA driver API.

typedef int (*LaunchKernel)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **arguments,
                            void **extra);
typedef int (*StreamIsCapturing)(void *stream, int *status);
typedef int (*GetCurrentContext)(void **context);

enum { CUDA = 2, COMPLEX = 5, MOST_ARGUMENTS = 4096, SLOTS = 1024, PROBES = 8 };

// The launch of one kind of call.
typedef struct {
  int uses;  // references from the table and from running calls
  uint32_t hash, form;
  Shape x, out;
  PyObject *kind, *option;
  PyObject *new_shape;  // shape of a new result; NULL if it equals the shape of x
  int may_be_same;      // whether out may be the memory of x
  int is_outside;       // whether out must not be in symmetric memory
  void *function;
  unsigned blocks, threads;
  size_t nbytes, source_at, out_at;  // size of the arguments; offsets of the two addresses in them
  char arguments[];
} Entry;

// The calls of one group on one device.
typedef struct Calls {
  PyObject_HEAD
  struct Calls *before;             // the next older object
  PyObject *group, *process_group;  // weak references; process_group is NULL for a group made from a store
  PyObject *name;
  int32_t ordinal;
  void *context;                    // the CUDA context of its launches
  const volatile uint32_t *status, *given_up;  // not 0 after a kernel has failed, or has given up
  const volatile uint64_t *last_stream;        // of the latest call; a call on another stream must wait for it
  Entry *entries[SLOTS];
} Calls;

static struct {
  const Exchange *exchange;
  LaunchKernel launch;
  StreamIsCapturing is_capturing;
  GetCurrentContext context;
  PyObject *tensor, *parameter, *keys_of_thread, *function_modes, *is_profiling, *is_grad_enabled;
  PyObject *increment_version, *empty_like, *world, *process_groups, *forward_mode;
  PyObject *starts, *sizes;  // of symmetric memory: sorted addresses, and the bytes by address
  unsigned long long usual_keys[2];
} torch;

static Calls *newest;  // head of the list of all Calls
static PyObject *s_raw_repr, *s_requires_grad, *s_is_neg, *s_is_conj, *s_is_inference, *s_new_empty, *s_closed;
static PyObject *s_default_pg, *s_current_level, *zero, *minus_one;

// Helpers.

static int no(void) {
  PyErr_Clear();
  return 0;
}

// Whether two values are the same object, or equal strings or integers. Does not run Python.
static int same_value(PyObject *a, PyObject *b) {
  if (a == b) return 1;
  if (Py_TYPE(a) != Py_TYPE(b) || !(PyUnicode_CheckExact(a) || PyLong_CheckExact(a))) return 0;
  return PyObject_RichCompareBool(a, b, Py_EQ) > 0;
}

// Whether a call returned this value. Consumes the reference.
static int gave(PyObject *result, PyObject *value) {
  const int is = result && same_value(result, value);
  Py_XDECREF(result);
  return is;
}

static PyObject *alive(PyObject *weak) {  // a new reference, or NULL if the object is gone
#if PY_VERSION_HEX >= 0x030D0000
  PyObject *object;
  return PyWeakref_GetRef(weak, &object) > 0 ? object : NULL;
#else
  PyObject *object = PyWeakref_GetObject(weak);
  return object == Py_None ? NULL : Py_NewRef(object);
#endif
}

// The thread.

static int is_usual_thread(void) {
  PyObject *keys = PyObject_CallNoArgs(torch.keys_of_thread);
  PyObject *raw = keys ? PyObject_CallMethodNoArgs(keys, s_raw_repr) : NULL;
  Py_XDECREF(keys);
  if (!raw) return 0;
  const unsigned long long value = PyLong_AsUnsignedLongLong(raw);
  Py_DECREF(raw);
  if (PyErr_Occurred()) return 0;
  return (value == torch.usual_keys[0] || value == torch.usual_keys[1]) &&
         gave(PyObject_CallNoArgs(torch.function_modes), zero) &&
         gave(PyObject_CallNoArgs(torch.is_profiling), Py_False) &&
         gave(PyObject_GetAttr(torch.forward_mode, s_current_level), minus_one);
}

// Tensors.

static size_t nbytes_of(const Shape *shape) {
  size_t count = shape->bits / 8;
  for (int dim = 0; dim < shape->ndim; ++dim) count *= (size_t)shape->shape[dim];
  return count;
}

// Whether the object is a tensor in contiguous plain memory on a GPU. Fills `tensor` and `shape`.
static int read_tensor(PyObject *object, Tensor *tensor, Shape *shape) {
  PyObject *const type = (PyObject *)Py_TYPE(object);
  if (type != torch.tensor && type != torch.parameter) return 0;
  if (torch.exchange->read(object, tensor)) return no();
  if (tensor->device.type != CUDA || !tensor->data || tensor->ndim > MOST_DIMS || tensor->lanes != 1) return 0;
  memset(shape, 0, sizeof *shape);
  shape->code = tensor->code, shape->bits = tensor->bits, shape->ndim = tensor->ndim;
  int64_t step = 1;
  for (int dim = tensor->ndim - 1; dim >= 0; --dim) {
    const int64_t size = tensor->shape[dim];
    if (size != 1 && tensor->strides && tensor->strides[dim] != step) return 0;
    shape->shape[dim] = size;
    step *= size;
  }
  tensor->data = (char *)tensor->data + tensor->byte_offset;
  return 1;
}

static int is_plain(PyObject *tensor, const Shape *shape) {
  return gave(PyObject_CallMethodNoArgs(tensor, s_is_neg), Py_False) &&
         (shape->code != COMPLEX || gave(PyObject_CallMethodNoArgs(tensor, s_is_conj), Py_False)) &&
         (gave(PyObject_GetAttr(tensor, s_requires_grad), Py_False) ||
          (!PyErr_Occurred() && gave(PyObject_CallNoArgs(torch.is_grad_enabled), Py_False)));
}

// Calls.

static void release(Entry *entry) {
  if (!entry || --entry->uses) return;
  Py_DECREF(entry->kind);
  Py_DECREF(entry->option);
  Py_XDECREF(entry->new_shape);
  PyMem_Free(entry);
}

static void forget(Calls *calls) {
  for (int slot = 0; slot < SLOTS; ++slot) {
    Entry *entry = calls->entries[slot];
    calls->entries[slot] = NULL;  // first, because release may run Python
    release(entry);
  }
}

static PyObject *calls_clear(PyObject *self, PyObject *nothing) {
  forget((Calls *)self);
  Py_RETURN_NONE;
}

static void calls_dealloc(PyObject *self) {
  Calls *calls = (Calls *)self, **at = &newest;
  while (*at && *at != calls) at = &(*at)->before;
  if (*at) *at = calls->before;
  forget(calls);
  Py_XDECREF(calls->group);
  Py_XDECREF(calls->process_group);
  Py_XDECREF(calls->name);
  Py_TYPE(self)->tp_free(self);
}

static PyObject *calls_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"group", "process_group", "name", "ordinal", "context", "status", "given_up", "last_stream",
                          NULL};
  PyObject *group, *process_group, *name;
  int ordinal;
  unsigned long long context, status, given_up, last_stream;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OUiKKKK", names, &_PyWeakref_RefType, &group, &process_group, &name,
                                   &ordinal, &context, &status, &given_up, &last_stream))
    return NULL;
  if (process_group != Py_None && !PyWeakref_CheckRef(process_group))
    return PyErr_Format(PyExc_TypeError, "a process group is given as a weak reference, or None");
  Calls *calls = (Calls *)type->tp_alloc(type, 0);
  if (!calls) return NULL;
  calls->group = Py_NewRef(group);
  calls->process_group = process_group == Py_None ? NULL : Py_NewRef(process_group);
  calls->name = Py_NewRef(name);
  calls->ordinal = ordinal, calls->context = (void *)(uintptr_t)context;
  calls->status = (const volatile uint32_t *)(uintptr_t)status;
  calls->given_up = (const volatile uint32_t *)(uintptr_t)given_up;
  calls->last_stream = (const volatile uint64_t *)(uintptr_t)last_stream;
  calls->before = newest;
  newest = calls;
  return (PyObject *)calls;
}

static uint32_t hash_of(const PyObject *kind, uint32_t form, const Shape *x) {
  uint32_t hash = (2166136261u ^ (uint32_t)((uintptr_t)kind >> 4)) * 16777619u;  // FNV-1a over 4 bytes at a time
  hash = (hash ^ form) * 16777619u;
  hash = (hash ^ x->code) * 16777619u, hash = (hash ^ x->bits) * 16777619u;
  for (int dim = 0; dim < x->ndim; ++dim) {
    hash = (hash ^ (uint32_t)x->shape[dim]) * 16777619u;
    hash = (hash ^ (uint32_t)(x->shape[dim] >> 32)) * 16777619u;
  }
  return hash ^ hash >> 15;
}

static int fits(const Entry *entry, uint32_t hash, PyObject *kind, uint32_t form, const Shape *x, PyObject *option) {
  return entry && entry->hash == hash && entry->kind == kind && entry->form == form &&
         !memcmp(&entry->x, x, sizeof *x) && same_value(entry->option, option);
}

// The slot of the matching entry, else the slot for a new entry.
static Entry **slot_of(Calls *calls, uint32_t hash, PyObject *kind, uint32_t form, const Shape *x, PyObject *option) {
  Entry **free = NULL;
  for (int probe = 0; probe < PROBES; ++probe) {
    Entry **slot = &calls->entries[(hash + probe) % SLOTS];
    if (fits(*slot, hash, kind, form, x, option)) return slot;
    if (!*slot && !free) free = slot;
  }
  return free ? free : &calls->entries[hash % SLOTS];
}

static PyObject *calls_add(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"kind",       "option",   "x",      "form",    "out",       "new_shape", "may_be_same",
                          "is_outside", "function", "blocks", "threads", "arguments", "source_at", "out_at", NULL};
  PyObject *kind, *option, *x, *out, *new_shape;
  int form, may_be_same, is_outside;
  unsigned blocks, threads;
  unsigned long long function;
  const char *arguments;
  Py_ssize_t nbytes, source_at, out_at;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOiOOppKIIy#nn", names, &kind, &option, &x, &form, &out, &new_shape,
                                   &may_be_same, &is_outside, &function, &blocks, &threads, &arguments, &nbytes, &source_at,
                                   &out_at))
    return NULL;
  const Py_ssize_t last = nbytes - (Py_ssize_t)sizeof(void *);
  if (form < 0 || form >= FORMS || nbytes > MOST_ARGUMENTS || source_at < 0 || source_at > last || out_at < 0 ||
      out_at > last) {
    PyErr_SetString(PyExc_ValueError, "an address is outside of the arguments, or the form is unknown");
    return NULL;
  }
  Tensor tensor;
  Shape shape, out_shape;
  if (!read_tensor(x, &tensor, &shape) || !read_tensor(out, &tensor, &out_shape)) Py_RETURN_FALSE;
  Entry *entry = PyMem_Calloc(1, sizeof *entry + nbytes);
  if (!entry) return PyErr_NoMemory();
  entry->uses = 1, entry->hash = hash_of(kind, form, &shape), entry->form = form;
  entry->x = shape, entry->out = out_shape;
  entry->kind = Py_NewRef(kind), entry->option = Py_NewRef(option);
  entry->new_shape = new_shape == Py_None ? NULL : Py_NewRef(new_shape);
  entry->may_be_same = may_be_same, entry->is_outside = is_outside;
  entry->function = (void *)(uintptr_t)function, entry->blocks = blocks, entry->threads = threads;
  entry->nbytes = nbytes, entry->source_at = source_at, entry->out_at = out_at;
  memcpy(entry->arguments, arguments, nbytes);
  Entry **slot = slot_of((Calls *)self, entry->hash, kind, form, &shape, option), *before = *slot;
  *slot = entry;
  release(before);
  Py_RETURN_TRUE;
}

// Find the newest Calls for a device and a group argument. Returns new references to them and to the group; NULL if
// there are none, or if the group was closed or destroyed.
static Calls *calls_of(PyObject *value, int32_t ordinal, PyObject **group) {
  PyObject *wanted = value == Py_None ? PyObject_GetAttr(torch.world, s_default_pg) : Py_NewRef(value);
  PyObject *process_group = NULL;
  Calls *calls = wanted ? newest : NULL;
  for (; calls; calls = calls->before) {  // runs no Python, because these are never the last references
    if (calls->ordinal != ordinal || !(*group = alive(calls->group))) continue;
    if (wanted == *group) break;
    process_group = calls->process_group ? alive(calls->process_group) : NULL;
    if (process_group && (wanted == process_group || (PyUnicode_CheckExact(wanted) && same_value(wanted, calls->name))))
      break;
    Py_XDECREF(process_group);
    process_group = NULL;
    Py_DECREF(*group);
  }
  Py_XINCREF(calls);
  if (calls && (!gave(PyObject_GetAttr(*group, s_closed), Py_False) ||
                (process_group && PyDict_Contains(torch.process_groups, process_group) != 1))) {
    Py_CLEAR(calls);
    Py_CLEAR(*group);
  }
  Py_XDECREF(process_group);
  Py_XDECREF(wanted);
  return calls;
}

// Whether an address may be in symmetric memory.
static int may_be_symmetric(const void *address) {
  const unsigned long long wanted = (uintptr_t)address;
  Py_ssize_t low = 0, high = PyList_GET_SIZE(torch.starts);
  while (low < high) {
    const Py_ssize_t middle = (low + high) / 2;
    if (PyLong_AsUnsignedLongLong(PyList_GET_ITEM(torch.starts, middle)) <= wanted)
      low = middle + 1;
    else
      high = middle;
  }
  if (!low) return 0;
  PyObject *const start = PyList_GET_ITEM(torch.starts, low - 1), *const size = PyDict_GetItem(torch.sizes, start);
  return !size || wanted - PyLong_AsUnsignedLongLong(start) < PyLong_AsUnsignedLongLong(size);
}

// Whether results may be written to out while x is read.
static int are_apart(const Entry *entry, const char *x, const char *out) {
  if (x + nbytes_of(&entry->x) <= out || out + nbytes_of(&entry->out) <= x) return 1;
  return x == out && entry->may_be_same;
}

// Launch on the current stream. Returns 0 if it is not the stream of the latest call, if it is being captured, if
// another CUDA context is current, or if the kernel is not for symmetric memory and out is there.
static int launch(Calls *calls, const Entry *entry, const void *source, const void *out) {
  void *context = NULL, *stream = NULL;
  int capturing = 1;
  if (entry->is_outside && may_be_symmetric(out)) return 0;
  if (*calls->status || *calls->given_up || torch.context(&context) || context != calls->context) return 0;
  if (torch.exchange->stream(CUDA, calls->ordinal, &stream)) return no();
  if ((uintptr_t)stream != *calls->last_stream) return 0;
  if (torch.is_capturing(stream, &capturing) || capturing) return 0;
  union {
    uint64_t aligned;
    char bytes[MOST_ARGUMENTS];
  } arguments;
  void *pointers[] = {arguments.bytes};
  memcpy(arguments.bytes, entry->arguments, entry->nbytes);
  memcpy(arguments.bytes + entry->source_at, &source, sizeof source);
  memcpy(arguments.bytes + entry->out_at, &out, sizeof out);
  void *const function = entry->function;
  const unsigned blocks = entry->blocks, threads = entry->threads;
  int code;
  Py_BEGIN_ALLOW_THREADS  // the launch waits if the stream is full
  code = torch.launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, NULL);
  Py_END_ALLOW_THREADS
  if (code) return 0;
  return 1;
}

// Tell autograd, so that a backward pass that needs the old values raises.
static int note_written(PyObject *tensor) {
  if (!gave(PyObject_CallMethodNoArgs(tensor, s_is_inference), Py_False)) return !PyErr_Occurred();
  PyObject *all = PyTuple_Pack(1, tensor), *done = all ? PyObject_CallOneArg(torch.increment_version, all) : NULL;
  Py_XDECREF(all);
  Py_XDECREF(done);
  return done != NULL;
}

// Repeat a call. Returns the result, or NULL if a check fails or torch has no memory for the result.
static PyObject *repeat(Calls *calls, const Entry *entry, PyObject *x, const Tensor *source, PyObject *out) {
  if (!is_plain(x, &entry->x)) return NULL;
  PyObject *result = entry->form != NEW ? Py_NewRef(out)
                     : entry->new_shape ? PyObject_CallMethodOneArg(x, s_new_empty, entry->new_shape)
                                        : PyObject_CallOneArg(torch.empty_like, x);
  if (!result) return NULL;
  Tensor target = *source;
  Shape shape;
  const int sound = entry->form == SAME ||
                    (read_tensor(result, &target, &shape) && !memcmp(&shape, &entry->out, sizeof shape) &&
                     target.device.ordinal == source->device.ordinal && are_apart(entry, source->data, target.data) &&
                     (entry->form == NEW || is_plain(result, &shape)));
  // The launch comes last, so that a call with an error has launched nothing.
  if (!sound || (entry->form != NEW && !note_written(result)) || !launch(calls, entry, source->data, target.data))
    Py_CLEAR(result);
  return result;
}

// run(kind, x, group, option, out) -> the result, or None if no earlier call matches.
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "run() takes 5 arguments, not %zd", count);
  PyObject *kind = args[0], *x = args[1], *option = args[3], *out = args[4], *group = NULL, *result = NULL;
  const uint32_t form = out == Py_None ? NEW : out == x ? SAME : OTHER;
  Tensor source;
  Shape shape;
  Calls *calls = NULL;
  if (newest && read_tensor(x, &source, &shape) && is_usual_thread())
    calls = calls_of(args[2], source.device.ordinal, &group);
  if (calls) {
    const uint32_t hash = hash_of(kind, form, &shape);
    Entry *entry = *slot_of(calls, hash, kind, form, &shape, option);
    if (fits(entry, hash, kind, form, &shape, option)) {
      ++entry->uses;
      result = repeat(calls, entry, x, &source, out);
      release(entry);
    }
    Py_DECREF(calls);
    Py_DECREF(group);  // kept until here, because the launch uses memory that the group owns
  }
  if (result || PyErr_Occurred()) return result;
  Py_RETURN_NONE;
}

// The same for operators.cpp; see eager.h. It has checked the thread and the tensors. Nothing here runs Python code.
static int repeat_request(Request *request) {
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject *group = NULL, *name = PyUnicode_FromString(request->group);
  PyObject *option = request->option      ? PyUnicode_FromString(request->option)
                     : request->root >= 0 ? PyLong_FromLongLong(request->root)
                                          : Py_NewRef(Py_None);
  Calls *calls = name && option ? calls_of(name, request->ordinal, &group) : NULL;
  int launched = 0;
  if (calls) {
    PyObject *const kind = request->kind;
    const uint32_t hash = hash_of(kind, request->form, &request->x);
    Entry *entry = *slot_of(calls, hash, kind, request->form, &request->x, option);
    if (fits(entry, hash, kind, request->form, &request->x, option)) {
      ++entry->uses;
      if (request->form == NEW) {
        Py_BEGIN_ALLOW_THREADS  // the allocator may wait for a thread that waits for the interpreter's lock
        request->target = request->allocate(request, &entry->out);
        Py_END_ALLOW_THREADS
      }
      launched = request->target &&
                 (request->form != OTHER || !memcmp(&request->out, &entry->out, sizeof entry->out)) &&
                 (request->form == SAME || are_apart(entry, request->source, request->target)) &&
                 launch(calls, entry, request->source, request->target);
      release(entry);
    }
    Py_DECREF(calls);
    Py_DECREF(group);
  }
  Py_XDECREF(name);
  Py_XDECREF(option);
  PyErr_Clear();
  PyGILState_Release(state);
  return launched;
}

// A method of a process group: it repeats an earlier call, or else calls the method in Python.

enum { TENSORS, PAIR, EXCHANGE, LAYOUTS };  // arguments: ([x], options), (out, x, options), (out, x, [], [], options)

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  int layout;
  PyObject *kind;        // key of its calls, besides the option
  PyObject *python;      // the method in Python
  PyObject *reductions;  // options of the calls, by the hash of `reduceOp`; None if there are none
  int has_root;          // whether the option is `rootRank`
  PyObject *count;       // key in the attribute `counts` of the process group
  PyObject *work;        // what a call returns
} Method;

static PyObject *s_async_op, *s_reduce_op, *s_root_rank, *s_counts;

// A borrowed or new reference to the option of a call; `made` is the latter. NULL if there is no such option.
static PyObject *option_of(const Method *method, PyObject *options, PyObject **made) {
  if (method->has_root) return *made = PyObject_GetAttr(options, s_root_rank);
  if (method->reductions == Py_None) return Py_None;
  PyObject *reduction = PyObject_GetAttr(options, s_reduce_op);
  const Py_hash_t hash = reduction ? PyObject_Hash(reduction) : -1;
  Py_XDECREF(reduction);
  PyObject *number = hash == -1 ? NULL : PyLong_FromSsize_t(hash);
  PyObject *found = number ? PyDict_GetItemWithError(method->reductions, number) : NULL;
  Py_XDECREF(number);
  return found;
}

static int is_empty(PyObject *list) { return PyList_CheckExact(list) && !PyList_GET_SIZE(list); }

// Whether an earlier call was repeated. `args` are the process group and the arguments.
static int is_repeated(const Method *method, PyObject *const *args, Py_ssize_t count) {
  PyObject *x, *out, *made = NULL, *const options = args[count - 1];
  if (method->layout == TENSORS) {
    if (count != 3 || !PyList_CheckExact(args[1]) || PyList_GET_SIZE(args[1]) != 1) return 0;
    x = out = PyList_GET_ITEM(args[1], 0);
  } else {
    if (method->layout == PAIR ? count != 4 : count != 6 || !is_empty(args[3]) || !is_empty(args[4])) return 0;
    out = args[1], x = args[2];
  }
  if (!gave(PyObject_GetAttr(options, s_async_op), Py_False)) return 0;
  PyObject *option = option_of(method, options, &made), *result = NULL;
  if (option) {
    Py_INCREF(x);  // the list may lose it
    PyObject *const request[] = {method->kind, x, args[0], option, out};
    result = run(NULL, request, 5);
    Py_DECREF(x);
  }
  Py_XDECREF(made);
  const int launched = result && result != Py_None;
  Py_XDECREF(result);
  return launched;
}

static void count_call(const Method *method, PyObject *process_group) {
  PyObject *counts = PyObject_GetAttr(process_group, s_counts);
  if (counts && PyDict_Check(counts)) {
    PyObject *before = PyDict_GetItemWithError(counts, method->count);
    PyObject *after = PyErr_Occurred() ? NULL : PyLong_FromLongLong((before ? PyLong_AsLongLong(before) : 0) + 1);
    if (after) PyDict_SetItem(counts, method->count, after);
    Py_XDECREF(after);
  }
  Py_XDECREF(counts);
}

static PyObject *method_call(PyObject *self, PyObject *const *args, size_t flags, PyObject *names) {
  Method *const method = (Method *)self;
  const Py_ssize_t count = PyVectorcall_NARGS(flags);
  if (!names && count > 2 && is_repeated(method, args, count)) {
    count_call(method, args[0]);
    PyErr_Clear();  // the launch has succeeded
    return Py_NewRef(method->work);
  }
  PyErr_Clear();  // Python makes the same call, and raises what is wrong. No interrupt: no Python code has run here.
  return PyObject_Vectorcall(method->python, args, flags, names);
}

static PyObject *method_get(PyObject *self, PyObject *process_group, PyObject *type) {
  return process_group && process_group != Py_None ? PyMethod_New(self, process_group) : Py_NewRef(self);
}

static PyObject *method_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"layout", "kind", "python", "reductions", "has_root", "count", "work", NULL};
  PyObject *kind, *python, *reductions, *counted, *work;
  int layout, has_root;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOOOpOO", names, &layout, &kind, &python, &reductions, &has_root,
                                   &counted, &work))
    return NULL;
  if (layout < 0 || layout >= LAYOUTS || (reductions != Py_None && !PyDict_Check(reductions)))
    return PyErr_Format(PyExc_ValueError, "the layout is unknown, or the reductions are not a dictionary");
  Method *method = (Method *)type->tp_alloc(type, 0);
  if (!method) return NULL;
  method->call = method_call;
  method->layout = layout, method->has_root = has_root;
  method->kind = Py_NewRef(kind), method->python = Py_NewRef(python), method->reductions = Py_NewRef(reductions);
  method->count = Py_NewRef(counted), method->work = Py_NewRef(work);
  return (PyObject *)method;
}

static void method_dealloc(PyObject *self) {
  Method *method = (Method *)self;
  Py_DECREF(method->kind);
  Py_DECREF(method->python);
  Py_DECREF(method->reductions);
  Py_DECREF(method->count);
  Py_DECREF(method->work);
  Py_TYPE(self)->tp_free(self);
}

// repeat_address() -> the address of the function Repeat of eager.h.
static PyObject *repeat_address(PyObject *self, PyObject *nothing) {
  const Repeat repeat = repeat_request;
  return PyLong_FromVoidPtr((void *)repeat);
}

// begin(...): pass what run() needs from torch and the driver; see eager.py.
static PyObject *begin(PyObject *self, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"exchange",       "launch",          "is_capturing",      "context",        "usual_keys",
                          "tensor",         "parameter",       "keys_of_thread",    "function_modes", "is_profiling",
                          "is_grad_enabled", "increment_version", "empty_like",     "world",          "process_groups",
                          "forward_mode",   "symmetric",       NULL};
  PyObject *capsule, *objects[13];
  unsigned long long launch_at, capturing_at, context_at, usual[2];
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OKKK(KK)OOOOOOOOOO!O(O!O!)", names, &capsule, &launch_at, &capturing_at,
                                   &context_at, &usual[0], &usual[1], &objects[0], &objects[1], &objects[2],
                                   &objects[3], &objects[4], &objects[5], &objects[6], &objects[7], &objects[8],
                                   &PyDict_Type, &objects[9], &objects[10], &PyList_Type, &objects[11], &PyDict_Type,
                                   &objects[12]))
    return NULL;
  const Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!exchange) return NULL;
  if (exchange->major != 1 || !exchange->read || !exchange->stream)
    return PyErr_Format(PyExc_RuntimeError, "version %u.%u of DLPack's exchange API is not supported, only 1.3",
                        exchange->major, exchange->minor);
  torch.exchange = exchange;
  torch.launch = (LaunchKernel)(uintptr_t)launch_at;
  torch.is_capturing = (StreamIsCapturing)(uintptr_t)capturing_at;
  torch.context = (GetCurrentContext)(uintptr_t)context_at;
  torch.usual_keys[0] = usual[0], torch.usual_keys[1] = usual[1];
  PyObject **const places[] = {
      &torch.tensor,       &torch.parameter,       &torch.keys_of_thread,    &torch.function_modes,
      &torch.is_profiling, &torch.is_grad_enabled, &torch.increment_version, &torch.empty_like,
      &torch.world,        &torch.process_groups,  &torch.forward_mode,      &torch.starts,
      &torch.sizes};
  for (int index = 0; index < 13; ++index) Py_XSETREF(*places[index], Py_NewRef(objects[index]));
  Py_RETURN_NONE;
}

static PyMethodDef calls_methods[] = {
    {"add", (PyCFunction)(void (*)(void))calls_add, METH_VARARGS | METH_KEYWORDS, "Remember the launch of a call."},
    {"clear", calls_clear, METH_NOARGS, "Forget all calls."},
    {NULL},
};

static PyMemberDef calls_members[] = {
    {NULL},
};

static PyTypeObject calls_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "_native.Calls",
    .tp_doc = "The calls of one group on one device.",
    .tp_basicsize = sizeof(Calls),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = calls_new,
    .tp_dealloc = calls_dealloc,
    .tp_methods = calls_methods,
    .tp_members = calls_members,
};

static PyMemberDef method_members[] = {
    {"__wrapped__", T_OBJECT, offsetof(Method, python), READONLY, "The method in Python."},
    {NULL},
};

static PyTypeObject method_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "_native.Method",
    .tp_doc = "A method of a process group that repeats earlier calls.",
    .tp_basicsize = sizeof(Method),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_vectorcall_offset = offsetof(Method, call),
    .tp_call = PyVectorcall_Call,
    .tp_descr_get = method_get,
    .tp_new = method_new,
    .tp_dealloc = method_dealloc,
    .tp_members = method_members,
};

static PyMethodDef functions[] = {
    {"begin", (PyCFunction)(void (*)(void))begin, METH_VARARGS | METH_KEYWORDS, "Pass what run() needs."},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, "Repeat an earlier call, or return None."},
    {"repeat_address", repeat_address, METH_NOARGS, "The function for operators.cpp."},
    {NULL},
};

int add_eager(PyObject *module) {
  struct {
    PyObject **name;
    const char *text;
  } texts[] = {{&s_raw_repr, "raw_repr"},         {&s_requires_grad, "requires_grad"}, {&s_is_neg, "is_neg"},
               {&s_is_conj, "is_conj"},           {&s_new_empty, "new_empty"},         {&s_closed, "closed"},
               {&s_is_inference, "is_inference"}, {&s_default_pg, "default_pg"},       {&s_async_op, "asyncOp"},
               {&s_reduce_op, "reduceOp"},        {&s_root_rank, "rootRank"},          {&s_counts, "counts"},
               {&s_current_level, "_current_level"}};
  for (size_t index = 0; index < sizeof texts / sizeof *texts; ++index)
    if (!(*texts[index].name = PyUnicode_InternFromString(texts[index].text))) return -1;
  if (!(zero = PyLong_FromLong(0)) || !(minus_one = PyLong_FromLong(-1))) return -1;
  if (PyModule_AddFunctions(module, functions) < 0 || PyModule_AddType(module, &calls_type) < 0) return -1;
  return PyModule_AddType(module, &method_type);
}
