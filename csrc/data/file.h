// POSIX files as the dataset core needs them: reads that cannot block on a FIFO, maps, durable writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace neox::data {

// A regular file opened for reading. Throws Fault with path and reason for anything else (folder, FIFO, no permission).
class InputFile {
  public:
    explicit InputFile(std::string path);
    ~InputFile();
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size_at_open() const { return size_; }
    // Throws Fault when the file no longer has the size it was opened with: reading a map of it could then raise SIGBUS.
    void check_unchanged() const;
    // Reads exactly `bytes` at `offset`; a short read is a Fault.
    void read_at(void* out, uint64_t bytes, uint64_t offset) const;
    int descriptor() const { return fd_; }

  private:
    std::string path_;
    int fd_ = -1;
    uint64_t size_ = 0;
};

// The whole file, mapped read-only; null for an empty file.
class Mapping {
  public:
    explicit Mapping(const InputFile& file);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    const uint8_t* bytes() const { return bytes_; }

  private:
    const uint8_t* bytes_ = nullptr;
    uint64_t size_ = 0;
};

// A file, written front to back through a buffer of `buffer_bytes`. Removed by the destructor unless publish() or keep() was reached.
class OutputFile {
  public:
    // Starts a new file or, where `resume_at` is not 0, goes on behind the first `resume_at` bytes of the one that is there; what it holds after
    // them is cut off. Call reread() before anything is written then. Throws Fault when the file is shorter, or is being written by another.
    OutputFile(std::string path, uint64_t buffer_bytes, uint64_t resume_at = 0);
    virtual ~OutputFile();
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    void write(const void* bytes, uint64_t count);
    void write_at(const void* bytes, uint64_t count, uint64_t offset);  // leaves the end of the file where it is; flush() first
    void read_at(void* out, uint64_t bytes, uint64_t offset);
    void flush();
    // Makes all that was written so far durable under the temporary name. Later writes start where they would have started without it.
    void sync();
    // Reads what is there back, buffer by buffer, as if it had just been written: full ones go to on_buffer_written, the rest stays in the buffer.
    void reread();
    void keep(bool stays = true) { keep_ = stays; }
    uint64_t size() const { return written_ + buffer_.size(); }
    // flush, fsync, rename to `final_path`, fsync of the folder: afterwards the file survives a power cut under its final name.
    void publish(const std::string& final_path);

  protected:
    virtual void on_buffer_written(const uint8_t*, uint64_t) {}  // sees each full buffer, and the last one, in order

  private:
    std::string path_;
    int fd_ = -1;
    uint64_t capacity_;
    uint64_t written_ = 0, resume_at_ = 0;
    std::vector<uint8_t> buffer_;
    bool keep_ = false;
};

void sync_folder_of(const std::string& path);
void remove_if_there(const std::string& path);

}  // namespace neox::data
