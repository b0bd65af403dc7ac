// Encodes chunks of a corpus on native threads. They never need Python's interpreter lock, so they continue while
// another thread holds it, for example while it imports a module.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "data/line_encoder.h"

namespace neox::data {

enum class ChunkKind { lines, text };

// A chunk to encode, and its result: `count` tokens of two bytes each, or of four if the encoder is wide.
struct EncodedChunk {
    const uint8_t* bytes;
    uint64_t length;
    ChunkKind kind;
    LineOptions options;

    std::unique_ptr<uint8_t[]> tokens;
    uint64_t count = 0;
    std::vector<int32_t> sizes;
    std::vector<UnsureLine> unsure;
    uint64_t blank = 0, empty = 0;
    bool valid = true;  // false for a text that is not UTF-8
    std::exception_ptr error;
    enum { waiting, running, done, cancelled } stage = waiting;
};

// The last of several threads works only while the caller waits for a result. The other threads and the caller then use
// all processors, and the caller, which reads the input, never waits for one.
class EncodeThreads {
  public:
    // With 0 threads, `start` itself encodes the chunk. The encoder must outlive this object.
    EncodeThreads(const TextEncoder& encoder, bool wide, int threads);
    ~EncodeThreads() { close(); }
    EncodeThreads(const EncodeThreads&) = delete;
    EncodeThreads& operator=(const EncodeThreads&) = delete;

    // Chunks are encoded in the order of their start. The bytes must stay valid until `wait` or `drop` has returned.
    std::shared_ptr<EncodedChunk> start(const uint8_t* bytes, uint64_t length, ChunkKind kind, LineOptions options);
    bool done(const EncodedChunk& chunk);
    // Waits for a chunk. Throws what encoding it threw.
    void wait(EncodedChunk& chunk);
    // The bytes of the chunk are not read after this call.
    void drop(EncodedChunk& chunk);
    // Waits for the chunks that are being encoded, cancels the others, and ends the threads.
    void close();

  private:
    void work(bool spare);
    void encode(EncodedChunk& chunk);

    const TextEncoder& encoder_;
    const bool wide_;
    LineStates states_;
    std::mutex mutex_;
    std::condition_variable given_, spare_given_, finished_;
    std::deque<std::shared_ptr<EncodedChunk>> waiting_;
    int callers_waiting_ = 0;
    bool closed_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace neox::data
