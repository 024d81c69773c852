// One act of a sequence of the ledger; symmem/group/ledger.py has the protocol.
//
// Ring(own, ids, head, mark, neighbours).enter(number, digest, text_id) stores this rank's word, executes a full fence,
// and loads the same word of the neighbours. It returns False if there is nothing else to do, and True if a word of the
// same act differs, if a mark is set, or if it is time to look at neighbours that are behind.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { RING = 1024, MOST_NEIGHBOURS = 2, SITES = 256 };

#if PY_VERSION_HEX < 0x030B0000
#include <frameobject.h>
#define PyFrame_GetLasti(frame) ((frame)->f_lasti * 2)
#endif

typedef struct {
  PyObject *code, *outer;  // only compared: `described` keeps them alive
  int at, outer_at;        // instructions
  Py_ssize_t fingerprint;
} Site;

typedef struct {
  PyObject_HEAD
  PyObject *known;
  Site sites[SITES];
  PyObject *described[SITES];  // null: no site
  Py_buffer own, ids, head, mark;          // of this rank
  Py_buffer neighbours[MOST_NEIGHBOURS];   // rings
  int count;
} Ring;

static void release(Ring *self) {
  Py_buffer *all[] = {&self->own, &self->ids, &self->head, &self->mark};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
    if (all[i]->obj) PyBuffer_Release(all[i]);
  for (int i = 0; i < self->count; ++i) PyBuffer_Release(&self->neighbours[i]);
  self->count = 0;
}

static int writable(PyObject *object, Py_buffer *view, Py_ssize_t nbytes) {
  if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE) < 0) return -1;
  if (view->len == nbytes) return 0;
  PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes is needed, not %zd", nbytes, view->len);
  return -1;
}

static int ring_init(PyObject *object, PyObject *arguments, PyObject *keywords) {
  Ring *self = (Ring *)object;
  PyObject *own, *ids, *head, *mark, *neighbours, *known = NULL;
  (void)keywords;
  if (!PyArg_ParseTuple(
          arguments, "OOOOO!|O!", &own, &ids, &head, &mark, &PyTuple_Type, &neighbours, &PyDict_Type, &known))
    return -1;
  Py_XINCREF(known);
  Py_XSETREF(self->known, known);
  if (PyTuple_GET_SIZE(neighbours) > MOST_NEIGHBOURS) {
    PyErr_SetString(PyExc_ValueError, "a rank has two neighbours at most");
    return -1;
  }
  if (writable(own, &self->own, 8 * RING) < 0 || writable(ids, &self->ids, 4 * RING) < 0 ||
      writable(head, &self->head, 8) < 0 || writable(mark, &self->mark, 8) < 0)
    return -1;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(neighbours); ++i) {
    if (writable(PyTuple_GET_ITEM(neighbours, i), &self->neighbours[i], 8 * RING) < 0) return -1;
    self->count = (int)i + 1;
  }
  return 0;
}

static void forget_sites(Ring *self) {
  for (int i = 0; i < SITES; ++i) Py_CLEAR(self->described[i]);
}

static void ring_dealloc(PyObject *object) {
  PyTypeObject *type = Py_TYPE(object);
  release((Ring *)object);
  forget_sites((Ring *)object);
  Py_CLEAR(((Ring *)object)->known);
  type->tp_free(object);
  Py_DECREF(type);
}

static PyObject *ring_enter(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
  Ring *self = (Ring *)object;
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "enter takes number, digest and text_id");
    return NULL;
  }
  const uint64_t number = PyLong_AsUnsignedLongLongMask(arguments[0]);
  const uint64_t digest = PyLong_AsUnsignedLongLongMask(arguments[1]);
  const uint64_t id = PyLong_AsUnsignedLongLongMask(arguments[2]);
  if (PyErr_Occurred()) return NULL;
  const uint64_t word = number << 32 | (digest & 0xFFFFFFFF);
  const size_t at = number % RING;
  atomic_store_explicit((_Atomic uint32_t *)self->ids.buf + at, (uint32_t)id, memory_order_relaxed);
  atomic_store_explicit((_Atomic uint64_t *)self->own.buf + at, word, memory_order_release);
  atomic_store_explicit((_Atomic uint64_t *)self->head.buf, word, memory_order_release);
  atomic_thread_fence(memory_order_seq_cst);
  int look = !(at & (RING / 2 - 1)) || atomic_load_explicit((_Atomic uint64_t *)self->mark.buf, memory_order_relaxed);
  for (int i = 0; i < self->count; ++i) {
    const uint64_t other =
        atomic_load_explicit((_Atomic uint64_t *)self->neighbours[i].buf + at, memory_order_acquire);
    look |= other != word && other >> 32 == word >> 32;
  }
  return PyBool_FromLong(look);
}

static PyObject *ring_find(PyObject *object, PyObject *const *arguments, Py_ssize_t count) {
  Ring *self = (Ring *)object;
  if (count != 3 || !PyFrame_Check(arguments[2]) || !self->known) {
    PyErr_SetString(PyExc_TypeError, "find takes name, fingerprint and frame, of a Ring with known call sites");
    return NULL;
  }
  PyObject *name = arguments[0];
  PyFrameObject *frame = (PyFrameObject *)arguments[2], *back = PyFrame_GetBack(frame), *outer = back ? back : frame;
  Site site;
  memset(&site, 0, sizeof site);  // for memcmp: the padding as well
  site.code = (PyObject *)PyFrame_GetCode(frame), site.outer = (PyObject *)PyFrame_GetCode(outer);
  site.at = PyFrame_GetLasti(frame), site.outer_at = PyFrame_GetLasti(outer);
  site.fingerprint = PyLong_AsSsize_t(arguments[1]);
  const size_t mixed = ((size_t)site.code >> 4) + ((size_t)site.outer >> 5) + (size_t)site.at * 31 +
                       (size_t)site.outer_at * 37 + (size_t)site.fingerprint * 41;
  const size_t slot = (mixed ^ mixed >> 8 ^ mixed >> 16) % SITES;
  PyObject *found = NULL, *key = NULL;
  if (!PyErr_Occurred() && name == Py_None && self->described[slot] &&
      !memcmp(&self->sites[slot], &site, sizeof site)) {
    found = self->described[slot];
  } else if (!PyErr_Occurred()) {
    key = Py_BuildValue(
        "(OONiNi)", name, arguments[1], PyLong_FromVoidPtr(site.code), site.at, PyLong_FromVoidPtr(site.outer),
        site.outer_at);
    found = key ? PyDict_GetItemWithError(self->known, key) : NULL;
    if (found && name == Py_None) {
      Py_INCREF(found);
      Py_XSETREF(self->described[slot], found);
      memcpy(&self->sites[slot], &site, sizeof site);
    }
  }
  if (!found && !PyErr_Occurred()) found = Py_None;
  Py_XINCREF(found);
  Py_XDECREF(key);
  Py_XDECREF(back);
  Py_DECREF(site.code);
  Py_DECREF(site.outer);
  return found;
}

static PyObject *ring_forget(PyObject *object, PyObject *arguments) {
  (void)arguments;
  Ring *self = (Ring *)object;
  forget_sites(self);
  if (self->known) PyDict_Clear(self->known);
  Py_RETURN_NONE;
}

static PyMethodDef ring_methods[] = {
    {"find", (PyCFunction)(void (*)(void))ring_find, METH_FASTCALL,
     "Look up the description of an allocation: name, fingerprint of the layout, frame. None if it is not known."},
    {"forget", ring_forget, METH_NOARGS, "Forget all descriptions."},
    {"enter", (PyCFunction)(void (*)(void))ring_enter, METH_FASTCALL,
     "Publish an act: number, digest, text_id. Returns whether the caller has to look closer."},
    {0}};

static PyType_Slot ring_slots[] = {{Py_tp_init, ring_init},
                                   {Py_tp_new, PyType_GenericNew},
                                   {Py_tp_dealloc, ring_dealloc},
                                   {Py_tp_methods, ring_methods},
                                   {0}};

static PyType_Spec ring_spec = {
    .name = "_native.Ring", .basicsize = sizeof(Ring), .flags = Py_TPFLAGS_DEFAULT, .slots = ring_slots};

int add_ledger(PyObject *module) {
  PyObject *type = PyType_FromSpec(&ring_spec);
  const int outcome = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
  Py_XDECREF(type);
  return outcome;
}
