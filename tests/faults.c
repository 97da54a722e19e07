/* Preloaded into a process: one of its calls that change something under a folder is its last, or fails.

   faults_arm(folder, call, phase, error): calls count from 0, -1 is none. phase 0: killed before it; 1: killed within
   it, half of the bytes written (only writes have a middle); 2: killed after it; 3: it and all later ones that need
   room fail with this error. faults_trace(fd): a line there for each call. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long next, target = -1;
static int phase, failure, trace = -1;

void faults_arm(const char *under, long call, int at, int error) {
    strncpy(folder, under, sizeof folder - 1);
    next = 0, target = call, phase = at, failure = error;
}

void faults_trace(int fd) { trace = fd; }

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

static char *path_of(int fd) {
    static __thread char path[PATH_MAX];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = 0;
    return path;
}

static char *joined(int home, const char *name) {
    char *path = path_of(home);
    size_t n = strlen(path);
    snprintf(path + n, PATH_MAX - n, "/%s", name);
    return path;
}

enum { GO_ON, HALF, DIE_AFTER, FAIL };

static int meet(const char *name, const char *path, int needs_room) {
    if (!folder[0] || !strstr(path, folder)) return GO_ON;
    long now = next++;
    if (trace >= 0) dprintf(trace, "%s %s\n", name, path);
    if (target < 0 || now < target || (now > target && phase != 3)) return GO_ON;
    if (phase == 0) die();
    return phase == 3 && !needs_room ? GO_ON : phase;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CALL(label, path, needs_room, half, whole) \
    int what = meet(label, path, needs_room); \
    if (what == FAIL) { errno = failure; return -1; } \
    if (what == HALF) { half; die(); } \
    __typeof__(whole) done = whole; \
    if (what == DIE_AFTER) die(); \
    return done

#define WRITE(name) ssize_t name(int fd, const void *data, size_t n) { \
    REAL(name); CALL("write", path_of(fd), 1, (void)!real(fd, data, n / 2), real(fd, data, n)); }
#define PWRITE(name, offset) ssize_t name(int fd, const void *data, size_t n, offset at) { \
    REAL(name); CALL("write", path_of(fd), 1, (void)!real(fd, data, n / 2, at), real(fd, data, n, at)); }
#define SENDFILE(name, offset) ssize_t name(int fd, int from, offset *at, size_t n) { \
    REAL(name); CALL("write", path_of(fd), 1, (void)!real(fd, from, at, n / 2), real(fd, from, at, n)); }
#define SYNC(name) int name(int fd) { REAL(name); CALL("fsync", path_of(fd), 0, real(fd), real(fd)); }
#define CUT(name, offset) int name(int fd, offset n) { \
    REAL(name); CALL("truncate", path_of(fd), 1, (void)0, real(fd, n)); }
#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if (!(flags & O_CREAT)) return real(path, flags, mode); \
    CALL("create", path, 1, (void)0, real(path, flags, mode)); }

#define AT(home, path) (path[0] == '/' ? path : joined(home, path))
#define OPENAT(name) int name(int home, const char *path, int flags, ...) { \
    REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    if (!(flags & O_CREAT)) return real(home, path, flags, mode); \
    CALL("create", AT(home, path), 1, (void)0, real(home, path, flags, mode)); }

WRITE(write)
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
SYNC(fsync)
SYNC(fdatasync)
CUT(ftruncate, off_t)
CUT(ftruncate64, off64_t)
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int rename(const char *from, const char *to) { REAL(rename); CALL("rename", to, 0, (void)0, real(from, to)); }
int unlink(const char *path) { REAL(unlink); CALL("unlink", path, 0, (void)0, real(path)); }
int rmdir(const char *path) { REAL(rmdir); CALL("unlink", path, 0, (void)0, real(path)); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); CALL("mkdir", path, 1, (void)0, real(path, mode)); }
int unlinkat(int home, const char *path, int flags) {
    REAL(unlinkat); CALL("unlink", AT(home, path), 0, (void)0, real(home, path, flags)); }
int mkdirat(int home, const char *path, mode_t mode) {
    REAL(mkdirat); CALL("mkdir", AT(home, path), 1, (void)0, real(home, path, mode)); }
int renameat(int home, const char *from, int there, const char *to) {
    REAL(renameat); CALL("rename", AT(there, to), 0, (void)0, real(home, from, there, to)); }
