/* A stand-in for libnvidia-ml.so.1 whose state is in files, beside the library or in $STANDIN_NVML:
 *
 *   devices            a line for each: UUID|name|total MiB|reserved MiB|UUID of the GPU whose MIG instance it is
 *   holds/UUID.PID     "MIB KINDS START LINGER_MS LISTED": what a process holds (KINDS: some of c, g, m; it is in these
 *                      lists); it counts while exactly this process lives, and LINGER_MS longer, in which it is listed
 *                      if LISTED is 1
 *   residue.UUID       MiB that no listed process holds
 *   driver             the driver's version
 *   mig.UUID           this GPU is in MIG mode even if it has no instance
 *   blind              no process is listed, as in a PID namespace
 *   restless           each list of processes differs from the one before
 *   untold             what a process holds is not told
 *   missing.FUNCTION   the driver does not have this function
 *   fault.FUNCTION.UUID   "CODE COUNT SECONDS": the next COUNT calls (-1: all) return CODE after SECONDS, or as soon as
 *                      the file is gone; UUID may be "any", and so may FUNCTION where there is a UUID
 *   calls              if it is there, each call adds a line to it: FUNCTION UUID
 *
 * Everything is read anew in each call. Only what the harness calls is here. As in the real library, what was initialised
 * before a fork is not initialised in the child, and threads may call at the same time.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, FUNCTION_NOT_FOUND = 13 };
enum { MOST = 64 };
#define MIB (1ULL << 20)

struct device { char uuid[96], name[96], parent[96]; unsigned long long total, reserved; };
struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

/* Handles point into this: their uuids never change. */
static struct device handles[MOST];
static int handle_count;
static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER;

static pid_t initialised_in;
static int initialisations;

static char beside[4096];

__attribute__((constructor)) static void find_beside(void) {
    Dl_info info;
    if (!dladdr((void *)find_beside, &info)) return;
    snprintf(beside, sizeof beside, "%s", info.dli_fname);
    char *slash = strrchr(beside, '/');
    if (slash) *slash = 0;
}

static const char *directory(void) {
    const char *named = getenv("STANDIN_NVML");
    return named ? named : beside;
}

static FILE *open_file(const char *mode, const char *format, ...) {
    char name[512], path[4700];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    snprintf(path, sizeof path, "%s/%s", directory(), name);
    return fopen(path, mode);
}

static int has(const char *name) {
    FILE *file = open_file("r", "%s", name);
    if (file) fclose(file);
    return file != NULL;
}

static int load(struct device *devices) {
    FILE *file = open_file("r", "devices");
    int count = 0;
    char line[512];
    while (file && count < MOST && fgets(line, sizeof line, file)) {
        struct device *one = &devices[count];
        one->parent[0] = 0;
        if (sscanf(line, "%95[^|]|%95[^|]|%llu|%llu|%95[^\n]", one->uuid, one->name, &one->total, &one->reserved,
                   one->parent) >= 4)
            count++;
    }
    if (file) fclose(file);
    return count;
}

static struct device *handle_of(const char *uuid) {
    struct device devices[MOST], *handle = NULL;
    int count = load(devices);
    pthread_mutex_lock(&handles_lock);
    for (int i = 0; i < handle_count && !handle; i++)
        if (!strcmp(handles[i].uuid, uuid)) handle = &handles[i];
    for (int i = 0; i < count && !handle && handle_count < MOST; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            handles[handle_count] = devices[i];
            handle = &handles[handle_count++];
        }
    pthread_mutex_unlock(&handles_lock);
    return handle;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void note(const char *function, const char *uuid) {
    if (!has("calls")) return;
    FILE *file = open_file("a", "calls");
    if (file) fprintf(file, "%s %s\n", function, uuid);
    if (file) fclose(file);
}

/* Take one call's worth from a file of faults, which other threads and processes use as well. Give whether it applies. */
static int take(const char *name, int *code, double *seconds) {
    int count = 0;
    *seconds = 0;
    FILE *file = open_file("r+", "%s", name);
    if (!file) return 0;
    flock(fileno(file), LOCK_EX);
    int applies = fscanf(file, "%d %d %lf", code, &count, seconds) >= 2 && count != 0;
    if (applies && count > 0) {
        rewind(file);
        /* Not shorter than what it overwrites. */
        fprintf(file, "%d %d %f        ", *code, count - 1, *seconds);
    }
    fclose(file);
    return applies;
}

static int is_initialised(void) { return initialised_in == getpid() && initialisations > 0; }

/* What a call has to return at once: OK if it may go on. */
static int faults(const char *function, const char *uuid) {
    char name[512];
    note(function, uuid);
    if (strncmp(function, "nvmlInit", 8) && !is_initialised()) return UNINITIALIZED;
    snprintf(name, sizeof name, "missing.%s", function);
    if (has(name)) return FUNCTION_NOT_FOUND;
    const char *which[][2] = {{function, uuid}, {function, "any"}, {"any", uuid}};
    for (int i = 0; i < 3; i++) {
        int code;
        double seconds, began = now();
        snprintf(name, sizeof name, "fault.%s.%s", which[i][0], which[i][1]);
        if (!take(name, &code, &seconds)) continue;
        while (now() - began < seconds && has(name)) usleep(2000);
        return code;
    }
    return OK;
}

/* Whether exactly this process lives: its start time is field 22 of its stat. */
static int lives(unsigned pid, unsigned long long start) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = 0;
    char *rest = strrchr(text, ')'), state = 0;
    unsigned long long found = 0;
    if (!rest || sscanf(rest + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
                        &state, &found) < 2)
        return 0;
    return found == start && state != 'Z' && state != 'X';
}

/* What is held beyond the process's end counts for a time that begins when somebody first looks. */
static int lingers(const char *hold, int linger_ms) {
    if (linger_ms <= 0) return 0;
    char path[4700];
    struct stat found;
    snprintf(path, sizeof path, "%s/died.%s", directory(), hold);
    if (stat(path, &found)) {
        FILE *file = fopen(path, "w");
        if (file) fclose(file);
        return 1;
    }
    return now() - (found.st_mtim.tv_sec + found.st_mtim.tv_nsec / 1e9) < linger_ms / 1e3;
}

/* Give the holders of one kind (0: of all), and what all of them hold. */
static int holders(const char *uuid, char wanted, struct process *found, unsigned long long *sum) {
    char path[4700];
    int count = 0;
    *sum = 0;
    snprintf(path, sizeof path, "%s/holds", directory());
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && count < MOST && (entry = readdir(folder));) {
        size_t length = strlen(uuid);
        if (strncmp(entry->d_name, uuid, length) || entry->d_name[length] != '.') continue;
        unsigned pid = (unsigned)atoi(entry->d_name + length + 1);
        unsigned long long mib = 0, start = 0;
        int linger_ms = 0, listed = 0;
        char kinds[4] = "";
        FILE *file = open_file("r", "holds/%s", entry->d_name);
        if (!file) continue;
        int fields = fscanf(file, "%llu %3s %llu %d %d", &mib, kinds, &start, &linger_ms, &listed);
        fclose(file);
        int is_there = fields >= 3 && lives(pid, start);
        if (fields < 3 || (!is_there && !lingers(entry->d_name, linger_ms))) continue;
        *sum += mib * MIB;
        if ((is_there || listed) && (!wanted || strchr(kinds, wanted)))
            found[count++] = (struct process){pid, has("untold") ? ~0ULL : mib * MIB, ~0u, ~0u};
    }
    if (folder) closedir(folder);
    return count;
}

static int read_memory(struct device *device, struct memory_v2 *memory) {
    struct process found[MOST];
    unsigned long long residue = 0;
    FILE *file = open_file("r", "residue.%s", device->uuid);
    if (file && fscanf(file, "%llu", &residue) != 1) residue = 0;
    if (file) fclose(file);
    memory->total = device->total * MIB;
    memory->reserved = device->reserved * MIB;
    holders(device->uuid, 0, found, &memory->used);
    memory->used += residue * MIB;
    memory->free = memory->total - memory->reserved - memory->used;
    return OK;
}

static int initialise(const char *function) {
    int fault = faults(function, "any");
    if (fault) return fault;
    if (initialised_in != getpid()) initialisations = 0;
    initialised_in = getpid();
    initialisations++;
    return OK;
}

int nvmlInitWithFlags(unsigned flags) { return (void)flags, initialise("nvmlInitWithFlags"); }
int nvmlInit_v2(void) { return initialise("nvmlInit_v2"); }

int nvmlShutdown(void) {
    int fault = faults("nvmlShutdown", "any");
    initialisations -= !fault;
    return fault;
}

const char *nvmlErrorString(int code) { return (void)code, "error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    FILE *file = open_file("r", "driver");
    if (!file || !fgets(text, (int)length, file)) snprintf(text, length, "stand-in");
    if (file) fclose(file);
    return faults("nvmlSystemGetDriverVersion", "any");
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    struct device devices[MOST];
    int all = load(devices);
    *count = 0;
    for (int i = 0; i < all; i++) *count += !devices[i].parent[0];
    return faults("nvmlDeviceGetCount_v2", "any");
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **handle) {
    struct device devices[MOST];
    int all = load(devices);
    for (int i = 0; i < all; i++)
        if (!devices[i].parent[0] && index-- == 0) {
            *handle = handle_of(devices[i].uuid);
            return faults("nvmlDeviceGetHandleByIndex_v2", devices[i].uuid);
        }
    return INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, struct device **handle) {
    *handle = handle_of(uuid);
    return *handle ? faults("nvmlDeviceGetHandleByUUID", uuid) : NOT_FOUND;
}

int nvmlDeviceGetUUID(struct device *device, char *text, unsigned length) {
    return snprintf(text, length, "%s", device->uuid), faults("nvmlDeviceGetUUID", device->uuid);
}

int nvmlDeviceGetName(struct device *device, char *text, unsigned length) {
    return snprintf(text, length, "%s", device->name), faults("nvmlDeviceGetName", device->uuid);
}

int nvmlDeviceGetMemoryInfo_v2(struct device *device, struct memory_v2 *memory) {
    int fault = faults("nvmlDeviceGetMemoryInfo_v2", device->uuid);
    return fault ? fault : read_memory(device, memory);
}

int nvmlDeviceGetMemoryInfo(struct device *device, struct memory *memory) {
    struct memory_v2 found;
    int fault = faults("nvmlDeviceGetMemoryInfo", device->uuid);
    if (fault) return fault;
    read_memory(device, &found);
    *memory = (struct memory){found.total, found.free, found.used + found.reserved};
    return OK;
}

static int list(const char *function, struct device *device, char kind, unsigned *count, struct process *processes) {
    struct process found[MOST];
    unsigned long long sum;
    int fault = faults(function, device->uuid);
    if (fault) return fault;
    unsigned size = has("blind") ? 0 : (unsigned)holders(device->uuid, kind, found, &sum), room = *count;
    static unsigned changes;
    if (kind == 'c' && size < MOST && has("restless")) found[size++] = (struct process){1u << 30 | changes++, 0, ~0u, ~0u};
    *count = size;
    if (room < size) return INSUFFICIENT_SIZE;
    if (size) memcpy(processes, found, size * sizeof *found);
    return OK;
}

#define LIST(name, kind) \
    int name(struct device *device, unsigned *count, struct process *processes) { \
        return list(#name, device, kind, count, processes); \
    }
LIST(nvmlDeviceGetComputeRunningProcesses_v3, 'c')
LIST(nvmlDeviceGetComputeRunningProcesses_v2, 'c')
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 'g')
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, 'g')
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, 'm')
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, 'm')

static struct device *instance(struct device *parent, unsigned index, unsigned *count) {
    struct device devices[MOST];
    struct device *found = NULL;
    int all = load(devices);
    *count = 0;
    for (int i = 0; i < all; i++)
        if (!strcmp(devices[i].parent, parent->uuid) && (*count)++ == index) found = handle_of(devices[i].uuid);
    return found;
}

int nvmlDeviceGetMigMode(struct device *device, unsigned *current, unsigned *pending) {
    unsigned count;
    char name[128];
    instance(device, 0, &count);
    snprintf(name, sizeof name, "mig.%s", device->uuid);
    *current = *pending = count > 0 || has(name);
    return faults("nvmlDeviceGetMigMode", device->uuid);
}

int nvmlDeviceGetMaxMigDeviceCount(struct device *device, unsigned *count) {
    instance(device, 0, count);
    *count += 1; /* one place is free */
    return faults("nvmlDeviceGetMaxMigDeviceCount", device->uuid);
}

int nvmlDeviceGetMigDeviceHandleByIndex(struct device *device, unsigned index, struct device **handle) {
    unsigned count;
    *handle = instance(device, index, &count);
    int fault = faults("nvmlDeviceGetMigDeviceHandleByIndex", device->uuid);
    return fault ? fault : *handle ? OK : NOT_FOUND;
}
