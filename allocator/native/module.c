// The Python module of the C files beside this one.

#include <Python.h>

int add_barrier(PyObject *module);
int add_ledger(PyObject *module);
int add_eager(PyObject *module);

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};

PyMODINIT_FUNC PyInit__native(void) {
  PyObject *module = PyModule_Create(&definition);
  if (module && (add_barrier(module) < 0 || add_ledger(module) < 0 || add_eager(module) < 0)) Py_CLEAR(module);
  return module;
}
