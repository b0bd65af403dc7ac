#include "data/encode_threads.h"

#include <algorithm>
#include <stdexcept>
#include <system_error>

namespace neox::data {

namespace {

template <typename T>
std::unique_ptr<uint8_t[]> narrowed(const uint32_t* ids, uint64_t count) {
    std::unique_ptr<uint8_t[]> out(new uint8_t[count * sizeof(T)]);  // aligned for every type
    T* to = reinterpret_cast<T*>(out.get());
    for (uint64_t i = 0; i < count; ++i) to[i] = static_cast<T>(ids[i]);
    return out;
}

}  // namespace

EncodeThreads::EncodeThreads(const TextEncoder& encoder, bool wide, int threads) : encoder_(encoder), wide_(wide) {
    try {
        for (int i = 0; i < threads; ++i) threads_.emplace_back([this, spare = i > 0 && i == threads - 1] { work(spare); });
    } catch (const std::system_error&) {
        // no more threads are to be had: those that there are do the work, or whoever starts a piece
    }
}

void EncodeThreads::close() {
    {
        const std::lock_guard<std::mutex> held(mutex_);
        closed_ = true;
        for (const auto& piece : waiting_) piece->stage = EncodedPiece::given_up;
        waiting_.clear();
    }
    given_.notify_all();
    spare_given_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

std::shared_ptr<EncodedPiece> EncodeThreads::start(const uint8_t* bytes, uint64_t length, PieceKind kind, LineOptions options) {
    auto piece = std::make_shared<EncodedPiece>();
    piece->bytes = bytes, piece->length = length, piece->kind = kind, piece->options = std::move(options);
    if (threads_.empty()) {
        encode(*piece);
        piece->stage = EncodedPiece::done;
        return piece;
    }
    {
        const std::lock_guard<std::mutex> held(mutex_);
        waiting_.push_back(piece);
        if (callers_waiting_ > 0) spare_given_.notify_one();
    }
    given_.notify_one();
    return piece;
}

bool EncodeThreads::done(const EncodedPiece& piece) {
    const std::lock_guard<std::mutex> held(mutex_);
    return piece.stage == EncodedPiece::done;
}

void EncodeThreads::wait(EncodedPiece& piece) {
    {
        std::unique_lock<std::mutex> held(mutex_);
        ++callers_waiting_;
        spare_given_.notify_one();
        finished_.wait(held, [&] { return piece.stage == EncodedPiece::done || piece.stage == EncodedPiece::given_up; });
        --callers_waiting_;
    }
    if (piece.stage == EncodedPiece::given_up) throw std::logic_error("the threads were closed before they came to this piece");
    if (piece.error) std::rethrow_exception(piece.error);
}

void EncodeThreads::drop(EncodedPiece& piece) {
    std::unique_lock<std::mutex> held(mutex_);
    waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), [&](const auto& other) { return other.get() == &piece; }), waiting_.end());
    finished_.wait(held, [&] { return piece.stage != EncodedPiece::runs; });
}

void EncodeThreads::work(bool spare) {
    std::unique_lock<std::mutex> held(mutex_);
    for (;;) {
        if (spare)
            spare_given_.wait(held, [this] { return closed_ || (callers_waiting_ > 0 && !waiting_.empty()); });
        else
            given_.wait(held, [this] { return closed_ || !waiting_.empty(); });
        if (waiting_.empty()) return;
        const std::shared_ptr<EncodedPiece> piece = std::move(waiting_.front());
        waiting_.pop_front();
        piece->stage = EncodedPiece::runs;
        held.unlock();
        encode(*piece);
        held.lock();
        piece->stage = EncodedPiece::done;
        finished_.notify_all();
    }
}

void EncodeThreads::encode(EncodedPiece& piece) {
    try {
        std::unique_ptr<LineState> state = states_.take();
        state->clear();
        if (piece.kind == PieceKind::lines)
            encode_lines(encoder_, piece.bytes, piece.length, piece.options, *state);
        else
            piece.valid = encode_text(encoder_, piece.bytes, piece.length, piece.options.eod, *state);
        piece.count = state->ids.size();
        piece.tokens = wide_ ? narrowed<int32_t>(state->ids.begin(), piece.count) : narrowed<uint16_t>(state->ids.begin(), piece.count);
        piece.sizes = std::move(state->sizes);
        piece.unsure = std::move(state->unsure);
        piece.blank = state->blank, piece.empty = state->empty;
        states_.give_back(std::move(state));
    } catch (...) {
        piece.error = std::current_exception();
    }
}

}  // namespace neox::data
