// Preloaded into a process, writes every call that changes files below the folder NEOX_RECORD_TOP to the descriptor NEOX_RECORD_FD,
// one line each, fields separated by tabs, bytes in hexadecimal digits.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int record_fd(void) {
    const char* text = getenv("NEOX_RECORD_FD");
    return text == NULL ? -1 : atoi(text);
}

static int inside(const char* path) {
    const char* top = getenv("NEOX_RECORD_TOP");
    return top != NULL && path != NULL && strncmp(path, top, strlen(top)) == 0;
}

static int path_of(int fd, char* out, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t count = readlink(link, out, size - 1);
    if (count < 0) return 0;
    out[count] = 0;
    return inside(out);
}

static void note(const char* call, const char* path, const char* other) {
    if (record_fd() >= 0) dprintf(record_fd(), other == NULL ? "%s\t%s\n" : "%s\t%s\t%s\n", call, path, other);
}

static void note_bytes(int fd, const unsigned char* bytes, ssize_t count, long long offset) {
    char path[4096];
    if (count <= 0 || fd == record_fd() || !path_of(fd, path, sizeof path)) return;
    char* text = malloc(2 * (size_t)count + 40);
    char* end = text + sprintf(text, "%lld\t", offset);
    for (ssize_t i = 0; i < count; ++i) end += sprintf(end, "%02x", bytes[i]);
    note("write", path, text);
    free(text);
}

static int note_open(const char* path, int flags, int existed, int fd) {
    if (fd >= 0 && inside(path) && (flags & (O_CREAT | O_TRUNC)) != 0 && (!existed || (flags & O_TRUNC) != 0))
        note(existed ? "truncate" : "create", path, NULL);
    return fd;
}

#define DEFINE_OPEN(name)                                                           \
    int name(const char* path, int flags, ...) {                                    \
        va_list arguments;                                                          \
        va_start(arguments, flags);                                                 \
        const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0; \
        va_end(arguments);                                                          \
        const int existed = inside(path) && access(path, F_OK) == 0;                \
        return note_open(path, flags, existed, REAL(name)(path, flags, mode));      \
    }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

ssize_t write(int fd, const void* bytes, size_t count) {
    const off_t offset = lseek(fd, 0, SEEK_CUR);
    const ssize_t done = REAL(write)(fd, bytes, count);
    note_bytes(fd, bytes, done, offset);
    return done;
}

ssize_t pwrite(int fd, const void* bytes, size_t count, off_t offset) {
    const ssize_t done = REAL(pwrite)(fd, bytes, count, offset);
    note_bytes(fd, bytes, done, offset);
    return done;
}

ssize_t pwrite64(int fd, const void* bytes, size_t count, off64_t offset) {
    const ssize_t done = REAL(pwrite64)(fd, bytes, count, offset);
    note_bytes(fd, bytes, done, offset);
    return done;
}

int fsync(int fd) {
    char path[4096];
    struct stat status;
    const int failed = REAL(fsync)(fd);
    if (failed == 0 && path_of(fd, path, sizeof path) && fstat(fd, &status) == 0) note(S_ISDIR(status.st_mode) ? "sync_dir" : "sync", path, NULL);
    return failed;
}

int rename(const char* from, const char* to) {
    const int failed = REAL(rename)(from, to);
    if (failed == 0 && inside(from)) note("rename", from, to);
    return failed;
}

int unlink(const char* path) {
    const int failed = REAL(unlink)(path);
    if (failed == 0 && inside(path)) note("unlink", path, NULL);
    return failed;
}
