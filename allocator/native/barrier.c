// A barrier between processes of one host, if nothing goes wrong; symmem/backends/signals.py has the protocol.
//
// Barrier(pads, rank, arrived, marks, unfinished, channel, awake).meet() arrives at the next barrier of a channel, and
// waits for the others as long as a rank stays awake. It returns True if all ranks have come and no mark is set. If it
// returns False, Python goes on where it would be after it had arrived itself.

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct {
  PyObject_HEAD
  Py_ssize_t size, rank, arrived, marks[2];  // indexes of words in a pad; a mark for each parity of the number
  double awake;                              // seconds
  PyObject *unfinished, *channel;            // a dictionary, and the key in it
  uint32_t **pads;
} Barrier;

static uint32_t load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static int is_marked(const Barrier *self, uint32_t number) {
  for (Py_ssize_t rank = 0; rank < self->size; ++rank)
    if (load(&self->pads[rank][self->marks[number & 1]])) return 1;
  return 0;
}

// Whether all have come, and none has given up or refused.
static int wait_for_all(const Barrier *self, uint32_t number) {
  double until = 0;
  for (Py_ssize_t step = 1; step < self->size; ++step) {
    const uint32_t *word = &self->pads[(self->rank + step) % self->size][self->arrived];
    while ((load(word) - number) & 0x80000000) {
      const double time = now();
      if (!until) until = time + self->awake;
      if (time >= until || is_marked(self, number)) return 0;
      sched_yield();  // the awaited rank may need this processor
    }
  }
  return !is_marked(self, number);
}

static PyObject *meet(PyObject *object, PyObject *nothing) {
  Barrier *const self = (Barrier *)object;
  uint32_t *const own = self->pads[self->rank], number = own[self->arrived] + 1;
  PyObject *value = PyLong_FromUnsignedLong(number);
  // It is noted first: if it cannot be, this rank has not arrived.
  const int failed = !value || PyDict_SetItem(self->unfinished, self->channel, value);
  Py_XDECREF(value);
  if (failed) return NULL;
  int passed;
  Py_BEGIN_ALLOW_THREADS
  __atomic_store_n(&own[self->marks[number & 1]], 0, __ATOMIC_RELAXED);
  __atomic_store_n(&own[self->arrived], number, __ATOMIC_RELEASE);
  syscall(SYS_futex, &own[self->arrived], FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);  // before marks are loaded: see "Giving up" in signals.py
  passed = wait_for_all(self, number);
  Py_END_ALLOW_THREADS
  if (!passed) Py_RETURN_FALSE;
  if (PyDict_DelItem(self->unfinished, self->channel)) return NULL;
  Py_RETURN_TRUE;
}

static PyObject *barrier_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"pads", "rank", "arrived", "marks", "unfinished", "channel", "awake", NULL};
  PyObject *pads, *unfinished, *channel;
  Py_ssize_t rank, arrived, even, odd;
  double awake;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!nn(nn)O!Od", names, &PyTuple_Type, &pads, &rank, &arrived, &even,
                                   &odd, &PyDict_Type, &unfinished, &channel, &awake))
    return NULL;
  const Py_ssize_t size = PyTuple_GET_SIZE(pads);
  if (rank < 0 || rank >= size) return PyErr_Format(PyExc_ValueError, "rank %zd of %zd pads", rank, size);
  Barrier *self = (Barrier *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->size = size, self->rank = rank, self->arrived = arrived, self->awake = awake;
  self->marks[0] = even, self->marks[1] = odd;
  self->unfinished = Py_NewRef(unfinished), self->channel = Py_NewRef(channel);
  self->pads = PyMem_Calloc(size, sizeof *self->pads);
  for (Py_ssize_t index = 0; self->pads && index < size; ++index)
    self->pads[index] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(pads, index));
  if (!self->pads) PyErr_NoMemory();
  if (PyErr_Occurred()) Py_CLEAR(self);
  return (PyObject *)self;
}

static void barrier_dealloc(PyObject *object) {
  Barrier *self = (Barrier *)object;
  Py_XDECREF(self->unfinished);
  Py_XDECREF(self->channel);
  PyMem_Free(self->pads);
  Py_TYPE(self)->tp_free(self);
}

static PyMethodDef methods[] = {
    {"meet", meet, METH_NOARGS, "Arrive at the next barrier. Returns whether all ranks have come and none gives up."},
    {NULL},
};

static PyTypeObject barrier_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "_native.Barrier",
    .tp_doc = "A barrier between processes of one host, if nothing goes wrong.",
    .tp_basicsize = sizeof(Barrier),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = barrier_new,
    .tp_dealloc = barrier_dealloc,
    .tp_methods = methods,
};

int add_barrier(PyObject *module) { return PyModule_AddType(module, &barrier_type); }
