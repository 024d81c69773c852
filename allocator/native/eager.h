// What operators.cpp needs from eager.c: it calls `repeat`, without Python's headers.
#ifndef SYMMEM_EAGER_H
#define SYMMEM_EAGER_H

#include <stdint.h>

enum { MOST_DIMS = 8 };
enum { NEW, SAME, OTHER, FORMS };  // the result's destination: a new tensor, x itself, another tensor given as out

typedef struct {
  uint16_t code, bits;  // the dtype, as in DLPack
  int32_t ndim;
  int64_t shape[MOST_DIMS];
} Shape;  // has no padding, and unused dimensions are 0, so that memcmp can compare shapes

// A call of an operator. Its tensors are contiguous plain memory of one device.
typedef struct Request {
  void *kind;  // symmem.ops.collectives.OperatorKind
  const char *option;  // the reduction, or NULL
  int64_t root;  // if it is not negative
  const char *group;  // name
  uint32_t form;
  int32_t ordinal;  // of the device
  Shape x;
  const void *source;
  // For NEW: returns memory for a result of this shape, or NULL. It is called without the interpreter's lock.
  void *(*allocate)(struct Request *request, const Shape *shape);
  Shape out;  // for OTHER
  void *target;  // the memory of the result; not for NEW
} Request;

// Repeat an earlier call: 1; or 0 if there is none, or it cannot be repeated now. Then nothing was launched. The caller
// need not hold the interpreter's lock.
typedef int (*Repeat)(Request *request);

#endif
