// Records the calls by which a test's process changes the disk, and lets one of them fail; lets reads and writes be
// interrupted and short. They are defined here, and so found before those of libc: to be included by one file of an
// executable.
#pragma once

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <vector>

namespace data_test {

struct DiskCalls {
    bool recording = false;
    std::vector<std::string> seen;  // such as "fsync data.bin"; a renamed file has its new name
    size_t failing = SIZE_MAX;      // number of the call that fails
    int error = EIO;                // with this errno
    size_t at_most = SIZE_MAX;      // bytes that one call reads or writes
    bool interrupting = false;      // every second read or write
    size_t reads_and_writes = 0;

    void record(size_t fails = SIZE_MAX, int with = EIO) {
        *this = {};
        recording = true, failing = fails, error = with;
    }
    void stop() { recording = false; }

    // Whether these calls were made in this order, with others before, between and after them.
    bool has(const std::vector<std::string>& wanted) const {
        auto at = seen.begin();
        for (const std::string& call : wanted) {
            at = std::find(at, seen.end(), call);
            if (at++ == seen.end()) return false;
        }
        return true;
    }
    // Whether no call `before` comes after the last call `after`.
    bool ends_with(const std::string& before, const std::string& after) const {
        const auto last = std::find(seen.rbegin(), seen.rend(), after);
        return last != seen.rend() && std::find(seen.rbegin(), last, before) == last;
    }
};

inline DiskCalls disk_calls;

inline std::string last_part(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

inline std::string path_of(int descriptor) {
    char path[4096];
    const ssize_t length = ::readlink(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), path, sizeof path);
    return {path, length < 0 ? 0 : static_cast<size_t>(length)};
}

// Records a call; false, with errno set, if it is the one that fails.
inline bool allowed(const std::string& kind, const std::string& path) {
    if (!disk_calls.recording) return true;
    disk_calls.seen.push_back(kind + " " + last_part(path));
    if (disk_calls.seen.size() - 1 != disk_calls.failing) return true;
    errno = disk_calls.error;
    return false;
}

// Whether a read or write is interrupted, with errno set; else `count` becomes what it transfers.
inline bool interrupted(size_t& count) {
    if (!disk_calls.recording) return false;
    count = std::min(count, disk_calls.at_most);
    errno = EINTR;
    return disk_calls.interrupting && ++disk_calls.reads_and_writes % 2 == 1;
}

}  // namespace data_test

extern "C" {

// nothing waits for the disk: no test cuts the power
int fsync(int descriptor) { return data_test::allowed("fsync", data_test::path_of(descriptor)) ? 0 : -1; }
int fdatasync(int descriptor) { return data_test::allowed("fdatasync", data_test::path_of(descriptor)) ? 0 : -1; }
ssize_t pwrite(int descriptor, const void* bytes, size_t count, off_t offset) {
    if (data_test::interrupted(count)) return -1;
    if (!data_test::allowed("write", data_test::path_of(descriptor))) return -1;
    return ::syscall(SYS_pwrite64, descriptor, bytes, count, offset);
}
ssize_t pread(int descriptor, void* bytes, size_t count, off_t offset) {
    if (data_test::interrupted(count)) return -1;
    return ::syscall(SYS_pread64, descriptor, bytes, count, offset);
}
int rename(const char* from, const char* to) noexcept {
    if (!data_test::allowed("rename", to)) return -1;
    return static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
int unlink(const char* path) noexcept {
    if (!data_test::allowed("unlink", path)) return -1;
    return static_cast<int>(::syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}
}
