// POSIX files as the dataset core needs them: reads that do not block on a FIFO, memory maps, durable writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace neox::data {

// A regular file, opened for reading. For anything else (folder, FIFO, no permission) the constructor throws a Fault
// with path and reason.
class InputFile {
  public:
    explicit InputFile(std::string path);
    ~InputFile();
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size_at_open() const { return size_; }
    // Throws Fault if the size of the file changed since it was opened: reading its map could then raise SIGBUS.
    void check_unchanged() const;
    // Reads exactly `bytes` at `offset`; a short read is a Fault.
    void read_at(void* out, uint64_t bytes, uint64_t offset) const;
    int descriptor() const { return fd_; }

  private:
    std::string path_;
    int fd_ = -1;
    uint64_t size_ = 0;
};

// The complete file, mapped read-only; null for an empty file.
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

// A file written front to back through a buffer of `buffer_bytes`. The destructor removes it unless publish() or keep()
// was called.
class OutputFile {
  public:
    // Creates a new file. With `resume_at` > 0, truncates the existing file to `resume_at` bytes and appends to it;
    // call reread() before the first write. Throws Fault if the file is shorter, or if another process is writing it.
    OutputFile(std::string path, uint64_t buffer_bytes, uint64_t resume_at = 0);
    virtual ~OutputFile();
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    void write(const void* bytes, uint64_t count);
    // does not move the end of the file; call flush() first
    void write_at(const void* bytes, uint64_t count, uint64_t offset);
    void read_at(void* out, uint64_t bytes, uint64_t offset);
    void flush();
    // Makes everything written so far durable under the temporary name. Later flushes stay aligned to full buffers.
    void sync();
    // Reads the existing content back as if it had just been written: full buffers go to on_buffer_written, the
    // remainder stays in the buffer.
    void reread();
    void keep(bool stays = true) { keep_ = stays; }
    uint64_t size() const { return written_ + buffer_.size(); }
    // Flush, fsync, rename to `final_path`, fsync of the folder: from then on the file survives a power cut under its
    // final name.
    void publish(const std::string& final_path);

  protected:
    // called in order for each full buffer and for the last one
    virtual void on_buffer_written(const uint8_t*, uint64_t) {}

  private:
    std::string path_;
    int fd_ = -1;
    uint64_t capacity_;
    uint64_t written_ = 0, resume_at_ = 0;
    std::vector<uint8_t> buffer_;
    bool keep_ = false;
};

void sync_folder_of(const std::string& path);

// Asks the system to start writing a range of a file to disk, so that a later sync waits for less. Does nothing where
// the system cannot be asked.
void start_writeback(int descriptor, int64_t offset, int64_t count);
void remove_if_there(const std::string& path);

}  // namespace neox::data
