#include "data/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "data/fault.h"

namespace neox::data {

namespace {

std::string reason(int error) { return std::strerror(error); }

Fault write_fault(const std::string& path, const char* doing, int error) {
    Fault fault(std::string("cannot ") + doing);
    fault.on_disk().at(path).found(reason(error)).advise("check free space and permissions of the folder");
    return fault;
}

const char* kind_of(mode_t mode) {
    if (S_ISDIR(mode)) return "a folder";
    if (S_ISFIFO(mode)) return "a FIFO";
    if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
    if (S_ISSOCK(mode)) return "a socket";
    return "not a regular file";
}

void write_fully(int fd, const std::string& path, const uint8_t* bytes, uint64_t count, uint64_t offset) {
    while (count > 0) {
        const ssize_t done = ::pwrite(fd, bytes, std::min<uint64_t>(count, 1u << 30), static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) throw write_fault(path, "write", done < 0 ? errno : ENOSPC);
        bytes += done;
        offset += static_cast<uint64_t>(done);
        count -= static_cast<uint64_t>(done);
    }
}

// Opens a file and locks it, so that two processes started for the same output do not write into one file.
int open_alone(const std::string& path, bool create) {
    for (;;) {
        const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | (create ? O_CREAT : 0), 0666);
        if (fd < 0) throw write_fault(path, create ? "create file" : "open file", errno);
        // any other error means a file system without locks
        if (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
            ::close(fd);
            throw Fault("another process is writing this file")
                .at(path)
                .advise("wait for it, stop it, or choose another output");
        }
        struct stat opened{}, named{};
        if (::fstat(fd, &opened) == 0 && ::stat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
            opened.st_dev == named.st_dev)
            return fd;
        ::close(fd);  // the other process has just published or removed it
    }
}

// Returns false at the end of the file.
bool read_fully(int fd, const std::string& path, uint8_t* out, uint64_t bytes, uint64_t offset) {
    while (bytes > 0) {
        const ssize_t done = ::pread(fd, out, std::min<uint64_t>(bytes, 1u << 30), static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) throw Fault("cannot read").at(path + " byte " + std::to_string(offset)).found(reason(errno));
        if (done == 0) return false;
        out += done;
        offset += static_cast<uint64_t>(done);
        bytes -= static_cast<uint64_t>(done);
    }
    return true;
}

}  // namespace

InputFile::InputFile(std::string path) : path_(std::move(path)) {
    // O_NONBLOCK: opening a FIFO without a writer must not hang; regular files ignore it.
    fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd_ < 0)
        throw Fault("cannot open data file")
            .at(path_)
            .found(reason(errno))
            .expected("a readable file")
            .advise("name the prefix that neox preprocess wrote, without .bin or .idx");
    struct stat info{};
    if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
        const std::string kind = kind_of(info.st_mode);
        ::close(fd_);
        throw Fault("cannot open data file").at(path_).found(kind).expected("a regular file");
    }
    size_ = static_cast<uint64_t>(info.st_size);
}

InputFile::~InputFile() { ::close(fd_); }

void InputFile::check_unchanged() const {
    struct stat info{};
    if (::fstat(fd_, &info) != 0) throw Fault("cannot read").at(path_).found(reason(errno));
    if (static_cast<uint64_t>(info.st_size) == size_) return;
    throw Fault("data file changed while it was open")
        .at(path_)
        .found(std::to_string(info.st_size) + " bytes")
        .expected(std::to_string(size_) + " bytes, as when it was opened")
        .advise("restore the file and start again");
}

void InputFile::read_at(void* out, uint64_t bytes, uint64_t offset) const {
    if (read_fully(fd_, path_, static_cast<uint8_t*>(out), bytes, offset)) return;
    check_unchanged();
    throw Fault("read beyond the end of the data file")
        .at(path_)
        .found("bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes))
        .expected("at most " + std::to_string(size_));
}

Mapping::Mapping(const InputFile& file) : size_(file.size_at_open()) {
    if (size_ == 0) return;
    void* address = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.descriptor(), 0);
    if (address == MAP_FAILED) throw Fault("cannot map data file").at(file.path()).found(reason(errno));
    bytes_ = static_cast<const uint8_t*>(address);
}

Mapping::~Mapping() {
    if (bytes_ != nullptr) ::munmap(const_cast<uint8_t*>(bytes_), size_);
}

OutputFile::OutputFile(std::string path, uint64_t buffer_bytes, uint64_t resume_at)
    : path_(std::move(path)), capacity_(buffer_bytes) {
    fd_ = open_alone(path_, resume_at == 0);
    struct stat info{};
    const bool whole = ::fstat(fd_, &info) == 0 && static_cast<uint64_t>(info.st_size) >= resume_at;
    if (!whole || ::ftruncate(fd_, static_cast<off_t>(resume_at)) != 0) {
        const int error = errno;
        ::close(fd_);
        if (whole) throw write_fault(path_, "truncate file", error);
        throw Fault("unfinished file is shorter than its recorded progress")
            .at(path_)
            .found(std::to_string(info.st_size) + " bytes")
            .expected("at least " + std::to_string(resume_at))
            .advise("start again without --resume");
    }
    resume_at_ = resume_at;
    buffer_.reserve(capacity_);
}

OutputFile::~OutputFile() {
    if (!keep_) ::unlink(path_.c_str());
    ::close(fd_);  // last, because this releases the lock
}

void OutputFile::write(const void* bytes, uint64_t count) {
    const auto* from = static_cast<const uint8_t*>(bytes);
    while (count > 0) {
        const uint64_t take = std::min(count, capacity_ - buffer_.size());
        buffer_.insert(buffer_.end(), from, from + take);
        from += take;
        count -= take;
        if (buffer_.size() == capacity_) flush();
    }
}

void OutputFile::flush() {
    if (buffer_.empty()) return;
    write_fully(fd_, path_, buffer_.data(), buffer_.size(), written_);
    start_writeback(fd_, static_cast<int64_t>(written_), static_cast<int64_t>(buffer_.size()));
    on_buffer_written(buffer_.data(), buffer_.size());
    written_ += buffer_.size();
    buffer_.clear();
}

void OutputFile::sync() {
    if (!buffer_.empty()) write_fully(fd_, path_, buffer_.data(), buffer_.size(), written_);
    if (::fdatasync(fd_) != 0) throw write_fault(path_, "sync", errno);
}

void OutputFile::reread() {
    for (uint64_t at = 0; at < resume_at_;) {
        buffer_.resize(std::min(capacity_, resume_at_ - at));
        read_at(buffer_.data(), buffer_.size(), at);
        at += buffer_.size();
        if (buffer_.size() < capacity_) break;
        on_buffer_written(buffer_.data(), buffer_.size());
        written_ += buffer_.size();
        buffer_.clear();
    }
}

void OutputFile::write_at(const void* bytes, uint64_t count, uint64_t offset) {
    write_fully(fd_, path_, static_cast<const uint8_t*>(bytes), count, offset);
}

void OutputFile::read_at(void* out, uint64_t bytes, uint64_t offset) {
    if (!read_fully(fd_, path_, static_cast<uint8_t*>(out), bytes, offset)) throw write_fault(path_, "read back", EIO);
}

void OutputFile::publish(const std::string& final_path) {
    flush();
    if (::fsync(fd_) != 0) throw write_fault(path_, "sync", errno);
    if (::rename(path_.c_str(), final_path.c_str()) != 0) throw write_fault(final_path, "rename file", errno);
    keep_ = true;
    sync_folder_of(final_path);
}

void sync_folder_of(const std::string& path) {
    const size_t slash = path.find_last_of('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) throw write_fault(folder, "open folder", errno);
    // Some network file systems refuse to sync a folder (EINVAL). The rename is then as durable as they make it.
    const bool failed = ::fsync(fd) != 0 && errno != EINVAL;
    const int error = errno;
    ::close(fd);
    if (failed) throw write_fault(folder, "sync folder", error);
}

void start_writeback(int descriptor, int64_t offset, int64_t count) {
#if defined(__linux__)
    ::sync_file_range(descriptor, offset, count, SYNC_FILE_RANGE_WRITE);
#else
    (void)descriptor, (void)offset, (void)count;
#endif
}

void remove_if_there(const std::string& path) {
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) throw write_fault(path, "remove", errno);
}

}  // namespace neox::data
