// Pieces of a corpus to tokens on threads of our own. These never need Python's lock: while another thread holds it, such as to load a library, they go on
// with the pieces that were started before.
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

enum class PieceKind { lines, text };

// A piece on its way, and then what it gave. `count` tokens of two bytes, or of four where the encoder is wide.
struct EncodedPiece {
    const uint8_t* bytes;
    uint64_t length;
    PieceKind kind;
    LineOptions options;

    std::unique_ptr<uint8_t[]> tokens;
    uint64_t count = 0;
    std::vector<int32_t> sizes;
    std::vector<UnsureLine> unsure;
    uint64_t blank = 0, empty = 0;
    bool valid = true;  // false: a text that is not UTF-8
    std::exception_ptr error;
    enum { waits, runs, done, given_up } stage = waits;
};

// With one thread less all processors are busy while the caller reads pieces, and it must not wait for a processor: the last of several threads works only
// while the caller waits.
class EncodeThreads {
  public:
    // threads: 0: a piece is encoded by whoever starts it. The encoder must outlive this.
    EncodeThreads(const TextEncoder& encoder, bool wide, int threads);
    ~EncodeThreads() { close(); }
    EncodeThreads(const EncodeThreads&) = delete;
    EncodeThreads& operator=(const EncodeThreads&) = delete;

    // Pieces are taken up in the order of their start. The bytes must stay until `wait` or `drop` has returned.
    std::shared_ptr<EncodedPiece> start(const uint8_t* bytes, uint64_t length, PieceKind kind, LineOptions options);
    bool done(const EncodedPiece& piece);
    // Waits for a piece. Throws what encoding it threw.
    void wait(EncodedPiece& piece);
    // Its bytes are not read any more after this.
    void drop(EncodedPiece& piece);
    // Waits for the pieces that are being encoded, gives the others up, and ends the threads.
    void close();

  private:
    void work(bool spare);
    void encode(EncodedPiece& piece);

    const TextEncoder& encoder_;
    const bool wide_;
    LineStates states_;
    std::mutex mutex_;
    std::condition_variable given_, spare_given_, finished_;
    std::deque<std::shared_ptr<EncodedPiece>> waiting_;
    int callers_waiting_ = 0;
    bool closed_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace neox::data
