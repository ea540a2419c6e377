/* A libnvidia-ml.so.1 that answers nvidia-ml-py from a text file, so that the real pynvml code runs without a GPU.
 *
 *   python tests/fake_nvml/build.py DIR
 *   LD_LIBRARY_PATH=DIR FAKE_NVML=gpus.txt python ...
 *
 * The file is read again at each call, so that facts can change under a running agent (replace it by rename).
 * FAKE_NVML unset or unreadable: the driver is not loaded.
 *
 * One `key value` a line, `#` starts a comment:
 *   driver 580.105.08      cuda 13000
 *   [gpu]                  starts a GPU: name uuid bus cc total_mib used_mib util temp power_mw limit_mw mig
 *   [mig]                  starts an instance of the GPU before it, with the same keys
 *   proc <c|g> <pid> <MiB> a process, compute or graphics; MiB `-` where the driver does not tell
 *   claim_procs <n>        the process calls lie about their count
 *   fail <function>=<code> the call returns that nvmlReturn_t; above the first [gpu] it holds for all
 *   slow <function>=<ms>   the call takes that long
 * Functions are named without version suffix (nvmlDeviceGetCount). -DOLD_DRIVER leaves out what old drivers lack.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, NOT_LOADED = 9 };
enum { MAX_DEVICES = 32, MAX_PROCESSES = 64, MAX_RULES = 16, TEXT = 96 };

typedef unsigned long long u64;

typedef struct { char kind; unsigned pid; u64 bytes; } Process;
typedef struct { char function[64]; int value; } Rule;
typedef struct { Rule rules[MAX_RULES]; int count; } Rules;

typedef struct {
  int parent; /* position of the GPU that a MIG instance belongs to, else -1 */
  char name[TEXT], uuid[TEXT], bus[32];
  u64 total_mib, used_mib, util, temp, power_mw, limit_mw, mig, claim_procs;
  int major, minor;
  Process processes[MAX_PROCESSES];
  int process_count;
  Rules fail, slow;
} Device;

static Device devices[MAX_DEVICES];
static int device_count, opened;
static char driver_version[TEXT];
static int cuda_version;
static Rules fail, slow;

/* -- the file -- */

static void copy(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

static void add_rule(Rules *rules, const char *text) {
  Rule rule;
  if (rules->count < MAX_RULES && sscanf(text, "%63[^=]=%d", rule.function, &rule.value) == 2)
    rules->rules[rules->count++] = rule;
}

static int rule_value(const Rules *rules, const char *function) {
  for (int i = 0; i < rules->count; i++)
    if (!strcmp(rules->rules[i].function, function)) return rules->rules[i].value;
  return 0;
}

static Device *add_device(int is_instance) {
  if (device_count == MAX_DEVICES) return NULL;
  Device *device = &devices[device_count];
  int gpu = device_count - 1;
  while (gpu >= 0 && devices[gpu].parent >= 0) gpu--;
  device->parent = is_instance ? gpu : -1;
  device->total_mib = 1024;
  device_count++;
  copy(device->name, TEXT, "Simulated GPU");
  snprintf(device->uuid, TEXT, "%s-00000000-0000-4000-8000-%012d", is_instance ? "MIG" : "GPU", device_count);
  snprintf(device->bus, sizeof device->bus, "00000000:%02X:00.0", device_count);
  return device;
}

static void add_process(Device *device, const char *text) {
  Process process;
  char mib[32];
  if (device->process_count == MAX_PROCESSES) return;
  if (sscanf(text, "%c %u %31s", &process.kind, &process.pid, mib) != 3) return;
  process.bytes = strcmp(mib, "-") ? strtoull(mib, NULL, 10) << 20 : ~0ULL;
  device->processes[device->process_count++] = process;
}

static void set_device_fact(Device *device, const char *key, const char *value) {
  struct { const char *key; u64 *number; } numbers[] = {
    {"total_mib", &device->total_mib}, {"used_mib", &device->used_mib}, {"util", &device->util},
    {"temp", &device->temp}, {"power_mw", &device->power_mw}, {"limit_mw", &device->limit_mw},
    {"mig", &device->mig}, {"claim_procs", &device->claim_procs},
  };
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    if (!strcmp(key, numbers[i].key)) *numbers[i].number = strtoull(value, NULL, 10);
  if (!strcmp(key, "name")) copy(device->name, TEXT, value);
  if (!strcmp(key, "uuid")) copy(device->uuid, TEXT, value);
  if (!strcmp(key, "bus")) copy(device->bus, sizeof device->bus, value);
  if (!strcmp(key, "cc")) sscanf(value, "%d.%d", &device->major, &device->minor);
  if (!strcmp(key, "proc")) add_process(device, value);
  if (!strcmp(key, "fail")) add_rule(&device->fail, value);
  if (!strcmp(key, "slow")) add_rule(&device->slow, value);
}

static void set_driver_fact(const char *key, const char *value) {
  if (!strcmp(key, "driver")) copy(driver_version, TEXT, value);
  if (!strcmp(key, "cuda")) cuda_version = atoi(value);
  if (!strcmp(key, "fail")) add_rule(&fail, value);
  if (!strcmp(key, "slow")) add_rule(&slow, value);
}

static int load(void) {
  const char *path = getenv("FAKE_NVML");
  FILE *file = path ? fopen(path, "r") : NULL;
  char line[512], key[64], value[384];
  Device *device = NULL;
  if (!file) return NOT_LOADED;
  memset(devices, 0, sizeof devices);
  memset(&fail, 0, sizeof fail);
  memset(&slow, 0, sizeof slow);
  device_count = 0;
  while (fgets(line, sizeof line, file)) {
    if (!strncmp(line, "[gpu]", 5) || !strncmp(line, "[mig]", 5)) {
      device = add_device(line[1] == 'm');
      if (!device) break;
    } else if (line[0] != '#' && sscanf(line, "%63s %383[^\n]", key, value) == 2) {
      if (device) set_device_fact(device, key, value);
      else set_driver_fact(key, value);
    }
  }
  fclose(file);
  return SUCCESS;
}

/* -- what every call does first -- */

static int apply(const Rules *failures, const Rules *delays, const char *function) {
  usleep(1000u * (unsigned)rule_value(delays, function));
  return rule_value(failures, function);
}

static int ask_driver(const char *function) {
  int code = opened ? load() : UNINITIALIZED;
  if (code == NOT_LOADED) opened = 0; /* a driver that comes back wants a new nvmlInit */
  return code ? code : apply(&fail, &slow, function);
}

/* A handle is a position in `devices`, plus one. */
static int ask_device(const char *function, void *handle, Device **device) {
  int code = ask_driver(function);
  long position = (long)handle - 1;
  if (code) return code;
  if (position < 0 || position >= device_count) return INVALID_ARGUMENT;
  *device = &devices[position];
  return apply(&(*device)->fail, &(*device)->slow, function);
}

static int give(char *out, unsigned size, const char *text) {
  if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
  strcpy(out, text);
  return SUCCESS;
}

#define DRIVER(function) do { int code = ask_driver(#function); if (code) return code; } while (0)
#define DEVICE(function) \
  Device *device; \
  do { int code = ask_device(#function, handle, &device); if (code) return code; } while (0)

/* -- the driver -- */

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  int code = load();
  if (!code) code = apply(&fail, &slow, "nvmlInit");
  if (!code) opened++;
  return code;
}

int nvmlShutdown(void) {
  if (!opened) return UNINITIALIZED;
  opened--;
  return SUCCESS;
}

const char *nvmlErrorString(int code) {
  (void)code;
  return "simulated error";
}

int nvmlSystemGetDriverVersion(char *out, unsigned size) {
  DRIVER(nvmlSystemGetDriverVersion);
  return give(out, size, driver_version);
}

int nvmlSystemGetCudaDriverVersion(int *out) {
  DRIVER(nvmlSystemGetCudaDriverVersion);
  *out = cuda_version;
  return SUCCESS;
}

/* -- finding devices -- */

int nvmlDeviceGetCount_v2(unsigned *out) {
  DRIVER(nvmlDeviceGetCount);
  *out = 0;
  for (int i = 0; i < device_count; i++) *out += devices[i].parent < 0;
  return SUCCESS;
}

/* The position of the index-th device that belongs to `parent`, or -1. */
static int find(int parent, unsigned index) {
  for (int i = 0; i < device_count; i++)
    if (devices[i].parent == parent && index-- == 0) return i;
  return -1;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
  DRIVER(nvmlDeviceGetHandleByIndex);
  int position = find(-1, index);
  if (position < 0) return INVALID_ARGUMENT;
  *out = (void *)(long)(position + 1);
  return apply(&devices[position].fail, &devices[position].slow, "nvmlDeviceGetHandleByIndex");
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
  DRIVER(nvmlDeviceGetHandleByUUID);
  for (long i = 0; i < device_count; i++)
    if (!strcmp(devices[i].uuid, uuid)) {
      *out = (void *)(i + 1);
      return SUCCESS;
    }
  return NOT_FOUND;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
  DEVICE(nvmlDeviceGetMigMode);
  *current = *pending = (unsigned)device->mig;
  return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *out) {
  DEVICE(nvmlDeviceGetMaxMigDeviceCount);
  *out = 7;
  return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **out) {
  DEVICE(nvmlDeviceGetMigDeviceHandleByIndex);
  int position = find((int)(device - devices), index);
  if (position < 0) return NOT_FOUND;
  *out = (void *)(long)(position + 1);
  return SUCCESS;
}

/* -- facts of a device -- */

int nvmlDeviceGetName(void *handle, char *out, unsigned size) {
  DEVICE(nvmlDeviceGetName);
  return give(out, size, device->name);
}

int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) {
  DEVICE(nvmlDeviceGetUUID);
  return give(out, size, device->uuid);
}

typedef struct { char legacy_bus[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;

int nvmlDeviceGetPciInfo_v3(void *handle, Pci *out) {
  DEVICE(nvmlDeviceGetPciInfo);
  memset(out, 0, sizeof *out);
  copy(out->bus_id, sizeof out->bus_id, device->bus);
  return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  DEVICE(nvmlDeviceGetCudaComputeCapability);
  *major = device->major;
  *minor = device->minor;
  return SUCCESS;
}

typedef struct { u64 total, free, used; } Memory;

int nvmlDeviceGetMemoryInfo(void *handle, Memory *out) {
  DEVICE(nvmlDeviceGetMemoryInfo);
  *out = (Memory){device->total_mib << 20, (device->total_mib - device->used_mib) << 20, device->used_mib << 20};
  return SUCCESS;
}

typedef struct { unsigned gpu, memory; } Utilization;

int nvmlDeviceGetUtilizationRates(void *handle, Utilization *out) {
  DEVICE(nvmlDeviceGetUtilizationRates);
  *out = (Utilization){(unsigned)device->util, 0};
  return SUCCESS;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *out) {
  DEVICE(nvmlDeviceGetTemperature);
  if (sensor) return INVALID_ARGUMENT;
  *out = (unsigned)device->temp;
  return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *out) {
  DEVICE(nvmlDeviceGetPowerUsage);
  *out = (unsigned)device->power_mw;
  return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *out) {
  DEVICE(nvmlDeviceGetEnforcedPowerLimit);
  *out = (unsigned)device->limit_mw;
  return SUCCESS;
}

/* -- processes -- */

typedef struct { unsigned pid; u64 bytes; unsigned gpu_instance, compute_instance; } ProcessInfo;

static int give_processes(const Device *device, char kind, unsigned *count, ProcessInfo *out) {
  unsigned room = *count, found = 0;
  for (int i = 0; i < device->process_count; i++) {
    const Process *process = &device->processes[i];
    if (process->kind != kind) continue;
    if (out && found < room) out[found] = (ProcessInfo){process->pid, process->bytes, ~0u, ~0u};
    found++;
  }
  *count = found;
  if (found && (!out || found > room)) return INSUFFICIENT_SIZE;
  if (found && device->claim_procs) *count = (unsigned)device->claim_procs;
  return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, ProcessInfo *out) {
  DEVICE(nvmlDeviceGetComputeRunningProcesses);
  return give_processes(device, 'c', count, out);
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *count, ProcessInfo *out) {
  DEVICE(nvmlDeviceGetGraphicsRunningProcesses);
  return give_processes(device, 'g', count, out);
}

#ifndef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *out) {
  return nvmlDeviceGetComputeRunningProcesses_v2(handle, count, out);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *out) {
  return nvmlDeviceGetGraphicsRunningProcesses_v2(handle, count, out);
}
#endif
