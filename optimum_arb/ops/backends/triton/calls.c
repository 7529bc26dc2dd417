/* A call of packed layers whose launches are ready, without a step of Python's interpreter: what the layers' tensors and
 * the input are is looked at, results are allocated, and launch.c launches.
 *
 * A module of Python, by its interface in C alone: torch's functions are called as Python would. Where it is not built
 * the same is done in Python. Everything that is not as it was when a call was made ready gives None: Python looks.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>

enum { MOST_RESULTS = 3, ADDRESSES = 6 };

/* launch.c: x, first result, extra, scratch, second result, third result */
typedef int (*launch_t)(const void *plan, void *stream, const uint64_t *addresses);

typedef struct {
    PyObject *values, *key, *tensor; /* a dict, and what stands in it: a tensor or None */
    unsigned long long address;
} watched_t;

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *type, *device_now, *stream_now, *empty, *hooked;
    PyObject *entries; /* shape of an input -> capsule of entry_t */
    watched_t *watched;
    Py_ssize_t watched_count;
    launch_t launch;
} calls_t;

typedef struct {
    PyObject *owner; /* of the plan */
    PyObject *dtype, *device;
    PyObject *results; /* a tuple of tuples, the arguments of `empty` */
    PyObject *scratch; /* one of these, or None */
    PyObject *written; /* a tuple of tensors and their versions, in turns */
    const void *plan;
    uint64_t extra;
    int one;
} entry_t;

static PyObject *name_address, *name_contiguous, *name_device, *name_dtype, *name_shape, *name_version;

static void free_entry(PyObject *capsule) {
    entry_t *entry = PyCapsule_GetPointer(capsule, NULL);
    if (!entry) return;
    Py_XDECREF(entry->owner);
    Py_XDECREF(entry->dtype);
    Py_XDECREF(entry->device);
    Py_XDECREF(entry->results);
    Py_XDECREF(entry->scratch);
    Py_XDECREF(entry->written);
    PyMem_Free(entry);
}

/* 0 and an address, or -1 and an error */
static int address_of(PyObject *tensor, unsigned long long *address) {
    PyObject *number = PyObject_CallMethodNoArgs(tensor, name_address);
    if (!number) return -1;
    *address = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return *address == (unsigned long long)-1 && PyErr_Occurred() ? -1 : 0;
}

/* 1 where an attribute is this very object, else 0; -1 and an error */
static int has(PyObject *object, PyObject *name, PyObject *value) {
    PyObject *found = PyObject_GetAttr(object, name);
    if (!found) return -1;
    Py_DECREF(found);
    return found == value;
}

/* 1 where what a function or method gives is equal to this number or truth value, else 0; -1 and an error */
static int gives(PyObject *result, PyObject *value) {
    if (!result) return -1;
    const int same = result == value ? 1 : PyObject_RichCompareBool(result, value, Py_EQ);
    Py_DECREF(result);
    return same;
}

/* 1 where all tensors are those of before, at the same places, else 0; -1 and an error */
static int unchanged(const calls_t *calls) {
    for (Py_ssize_t i = 0; i < calls->watched_count; ++i) {
        const watched_t *each = &calls->watched[i];
        unsigned long long address;
        PyObject *tensor = PyDict_GetItemWithError(each->values, each->key);
        if (tensor != each->tensor) return PyErr_Occurred() ? -1 : 0;
        if (tensor == Py_None) continue;
        if (address_of(tensor, &address)) return -1;
        if (address != each->address) return 0;
    }
    return 1;
}

static int unwritten(const entry_t *entry) {
    const Py_ssize_t count = PyTuple_GET_SIZE(entry->written);
    for (Py_ssize_t i = 0; i + 1 < count; i += 2) {
        PyObject *version = PyObject_GetAttr(PyTuple_GET_ITEM(entry->written, i), name_version);
        const int same = gives(version, PyTuple_GET_ITEM(entry->written, i + 1));
        if (same != 1) return same;
    }
    return 1;
}

/* 1 where a call with this input is ready, else 0; -1 and an error */
static int fits(const calls_t *calls, const entry_t *entry, PyObject *x, unsigned long long *address) {
    int found = has(x, name_dtype, entry->dtype);
    if (found == 1) found = gives(PyObject_CallMethodNoArgs(x, name_contiguous), Py_True);
    if (found == 1) found = gives(PyObject_CallMethodNoArgs(x, name_device), entry->device);
    if (found == 1) found = gives(PyObject_CallNoArgs(calls->device_now), entry->device);
    if (found == 1) found = gives(PyObject_CallNoArgs(calls->hooked), Py_False);
    if (found == 1) found = address_of(x, address) ? -1 : *address % 16 == 0;
    if (found == 1) found = unchanged(calls);
    if (found == 1) found = unwritten(entry);
    return found;
}

static PyObject *allocate(const calls_t *calls, PyObject *args, unsigned long long *address) {
    PyObject *made = PyObject_Vectorcall(calls->empty, &PyTuple_GET_ITEM(args, 0), (size_t)PyTuple_GET_SIZE(args), NULL);
    if (made && address_of(made, address)) Py_CLEAR(made);
    return made;
}

static PyObject *launch(const calls_t *calls, const entry_t *entry, unsigned long long x) {
    static const int places[MOST_RESULTS] = {1, 4, 5};
    uint64_t addresses[ADDRESSES] = {x, 0, entry->extra, 0, 0, 0};
    unsigned long long address, stream;
    const Py_ssize_t count = PyTuple_GET_SIZE(entry->results);
    PyObject *scratch = NULL, *number, *results = PyList_New(count);
    if (!results) return NULL;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject *made = allocate(calls, PyTuple_GET_ITEM(entry->results, i), &address);
        if (!made) goto failed;
        PyList_SET_ITEM(results, i, made);
        addresses[places[i]] = address;
    }
    if (entry->scratch != Py_None) {
        if (!(scratch = allocate(calls, entry->scratch, &address))) goto failed;
        addresses[3] = address;
    }
    if (!(number = PyObject_CallOneArg(calls->stream_now, entry->device))) goto failed;
    stream = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (stream == (unsigned long long)-1 && PyErr_Occurred()) goto failed;
    int code;
    Py_BEGIN_ALLOW_THREADS; /* it waits where the GPU's queue is full */
    code = calls->launch(entry->plan, (void *)(uintptr_t)stream, addresses);
    Py_END_ALLOW_THREADS;
    if (code) {
        PyObject *raised = PyObject_CallMethod(entry->owner, "fail", "i", code);
        Py_XDECREF(raised);
        if (raised) PyErr_SetString(PyExc_RuntimeError, "a launch failed");
        goto failed;
    }
    Py_XDECREF(scratch);
    if (!entry->one) return results;
    PyObject *only = Py_NewRef(PyList_GET_ITEM(results, 0));
    Py_DECREF(results);
    return only;
failed:
    Py_XDECREF(scratch);
    Py_DECREF(results);
    return NULL;
}

static PyObject *calls_call(PyObject *self, PyObject *const *args, size_t flags, PyObject *names) {
    calls_t *calls = (calls_t *)self;
    if (PyVectorcall_NARGS(flags) != 1 || names) {
        PyErr_SetString(PyExc_TypeError, "one input is expected");
        return NULL;
    }
    PyObject *x = args[0];
    if ((PyObject *)Py_TYPE(x) != calls->type) Py_RETURN_NONE;
    PyObject *shape = PyObject_GetAttr(x, name_shape);
    if (!shape) return NULL;
    PyObject *capsule = PyDict_GetItemWithError(calls->entries, shape);
    Py_DECREF(shape);
    if (!capsule) {
        if (PyErr_Occurred()) return NULL;
        Py_RETURN_NONE;
    }
    const entry_t *entry = PyCapsule_GetPointer(capsule, NULL);
    if (!entry) return NULL;
    unsigned long long address;
    PyObject *found = NULL;
    Py_INCREF(capsule); /* another thread may replace the entry */
    const int ready = fits(calls, entry, x, &address);
    if (ready == 1)
        found = launch(calls, entry, address);
    else if (!ready)
        found = Py_NewRef(Py_None);
    Py_DECREF(capsule);
    return found;
}

/* add(shape, dtype, device, owner, plan, extra, results, scratch, written, one) */
static PyObject *calls_add(PyObject *self, PyObject *args) {
    calls_t *calls = (calls_t *)self;
    PyObject *shape, *dtype, *device, *owner, *results, *scratch, *written;
    unsigned long long plan, extra;
    int one;
    if (!PyArg_ParseTuple(args, "OOOOKKO!OO!p", &shape, &dtype, &device, &owner, &plan, &extra, &PyTuple_Type, &results,
                          &scratch, &PyTuple_Type, &written, &one))
        return NULL;
    const Py_ssize_t count = PyTuple_GET_SIZE(results);
    int wrong = count < 1 || count > MOST_RESULTS || (scratch != Py_None && !PyTuple_Check(scratch));
    for (Py_ssize_t i = 0; !wrong && i < count; ++i) wrong = !PyTuple_Check(PyTuple_GET_ITEM(results, i));
    if (wrong) {
        PyErr_SetString(PyExc_TypeError, "results and scratch memory are tuples, the arguments of an allocation");
        return NULL;
    }
    entry_t *entry = PyMem_Calloc(1, sizeof *entry);
    if (!entry) return PyErr_NoMemory();
    entry->owner = Py_NewRef(owner);
    entry->dtype = Py_NewRef(dtype);
    entry->device = Py_NewRef(device);
    entry->results = Py_NewRef(results);
    entry->scratch = Py_NewRef(scratch);
    entry->written = Py_NewRef(written);
    entry->plan = (const void *)(uintptr_t)plan;
    entry->extra = extra;
    entry->one = one;
    PyObject *capsule = PyCapsule_New(entry, NULL, free_entry);
    if (!capsule) {
        PyMem_Free(entry);
        return NULL;
    }
    const int failed = PyDict_SetItem(calls->entries, shape, capsule);
    Py_DECREF(capsule);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static int calls_clear(PyObject *self) {
    calls_t *calls = (calls_t *)self;
    for (Py_ssize_t i = 0; i < calls->watched_count; ++i) {
        Py_CLEAR(calls->watched[i].values);
        Py_CLEAR(calls->watched[i].key);
        Py_CLEAR(calls->watched[i].tensor);
    }
    calls->watched_count = 0;
    PyMem_Free(calls->watched);
    calls->watched = NULL;
    Py_CLEAR(calls->type);
    Py_CLEAR(calls->device_now);
    Py_CLEAR(calls->stream_now);
    Py_CLEAR(calls->empty);
    Py_CLEAR(calls->hooked);
    Py_CLEAR(calls->entries);
    return 0;
}

static void calls_dealloc(PyObject *self) {
    calls_clear(self);
    Py_TYPE(self)->tp_free(self);
}

/* Calls(type, watched, device_now, stream_now, empty, hooked, launch) */
static PyObject *calls_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    PyObject *tensor_type, *watched, *device_now, *stream_now, *empty, *hooked;
    unsigned long long function;
    if (names && PyDict_GET_SIZE(names)) {
        PyErr_SetString(PyExc_TypeError, "arguments go by their places");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OO!OOOOK", &tensor_type, &PyTuple_Type, &watched, &device_now, &stream_now, &empty,
                          &hooked, &function))
        return NULL;
    calls_t *calls = (calls_t *)type->tp_alloc(type, 0);
    if (!calls) return NULL;
    calls->vectorcall = calls_call;
    calls->type = Py_NewRef(tensor_type);
    calls->device_now = Py_NewRef(device_now);
    calls->stream_now = Py_NewRef(stream_now);
    calls->empty = Py_NewRef(empty);
    calls->hooked = Py_NewRef(hooked);
    calls->launch = (launch_t)(uintptr_t)function;
    const Py_ssize_t count = PyTuple_GET_SIZE(watched);
    calls->entries = PyDict_New();
    calls->watched = PyMem_Calloc((size_t)count + 1, sizeof *calls->watched);
    if (!calls->entries || !calls->watched) {
        Py_DECREF(calls);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject *values, *key, *tensor;
        unsigned long long address = 0;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(watched, i), "O!OO", &PyDict_Type, &values, &key, &tensor) ||
            (tensor != Py_None && address_of(tensor, &address))) {
            Py_DECREF(calls);
            return NULL;
        }
        calls->watched[i] = (watched_t){Py_NewRef(values), Py_NewRef(key), Py_NewRef(tensor), address};
        calls->watched_count = i + 1;
    }
    return (PyObject *)calls;
}

static PyMethodDef methods[] = {
    {"add", calls_add, METH_VARARGS, "A call that is ready, for inputs of a shape."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject calls_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "optimum_arb.ops.backends.triton._calls.Calls",
    .tp_doc = "Calls of layers that are ready: takes an input, gives the result (or a list of them), or None.",
    .tp_basicsize = sizeof(calls_t),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(calls_t, vectorcall),
    .tp_new = calls_new,
    .tp_dealloc = calls_dealloc,
    .tp_methods = methods,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_calls", .m_doc = "Calls of packed layers whose launches are ready.", .m_size = -1};

PyMODINIT_FUNC PyInit__calls(void) {
    struct {
        PyObject **name;
        const char *text;
    } names[] = {
        {&name_address, "data_ptr"}, {&name_contiguous, "is_contiguous"}, {&name_device, "get_device"},
        {&name_dtype, "dtype"},      {&name_shape, "shape"},              {&name_version, "_version"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
        if (!(*names[i].name = PyUnicode_InternFromString(names[i].text))) return NULL;
    if (PyType_Ready(&calls_type) < 0) return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddObjectRef(made, "Calls", (PyObject *)&calls_type) < 0) Py_CLEAR(made);
    return made;
}
