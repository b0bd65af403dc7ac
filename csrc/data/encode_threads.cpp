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
        for (int i = 0; i < threads; ++i)
            threads_.emplace_back([this, spare = i > 0 && i == threads - 1] { work(spare); });
    } catch (const std::system_error&) {
        // no more threads can be started: the existing ones do the work, or `start` if there is none
    }
}

void EncodeThreads::close() {
    {
        const std::lock_guard<std::mutex> held(mutex_);
        closed_ = true;
        for (const auto& chunk : waiting_) chunk->stage = EncodedChunk::cancelled;
        waiting_.clear();
    }
    given_.notify_all();
    spare_given_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

std::shared_ptr<EncodedChunk> EncodeThreads::start(const uint8_t* bytes, uint64_t length, ChunkKind kind,
                                                   LineOptions options) {
    auto chunk = std::make_shared<EncodedChunk>();
    chunk->bytes = bytes, chunk->length = length, chunk->kind = kind, chunk->options = std::move(options);
    if (threads_.empty()) {
        encode(*chunk);
        chunk->stage = EncodedChunk::done;
        return chunk;
    }
    {
        const std::lock_guard<std::mutex> held(mutex_);
        waiting_.push_back(chunk);
        if (callers_waiting_ > 0) spare_given_.notify_one();
    }
    given_.notify_one();
    return chunk;
}

bool EncodeThreads::done(const EncodedChunk& chunk) {
    const std::lock_guard<std::mutex> held(mutex_);
    return chunk.stage == EncodedChunk::done;
}

void EncodeThreads::wait(EncodedChunk& chunk) {
    {
        std::unique_lock<std::mutex> held(mutex_);
        ++callers_waiting_;
        spare_given_.notify_one();
        finished_.wait(held,
                       [&] { return chunk.stage == EncodedChunk::done || chunk.stage == EncodedChunk::cancelled; });
        --callers_waiting_;
    }
    if (chunk.stage == EncodedChunk::cancelled)
        throw std::logic_error("the threads were closed before this chunk was encoded");
    if (chunk.error) std::rethrow_exception(chunk.error);
}

void EncodeThreads::drop(EncodedChunk& chunk) {
    std::unique_lock<std::mutex> held(mutex_);
    waiting_.erase(
        std::remove_if(waiting_.begin(), waiting_.end(), [&](const auto& other) { return other.get() == &chunk; }),
        waiting_.end());
    finished_.wait(held, [&] { return chunk.stage != EncodedChunk::running; });
}

void EncodeThreads::work(bool spare) {
    std::unique_lock<std::mutex> held(mutex_);
    for (;;) {
        if (spare)
            spare_given_.wait(held, [this] { return closed_ || (callers_waiting_ > 0 && !waiting_.empty()); });
        else
            given_.wait(held, [this] { return closed_ || !waiting_.empty(); });
        if (waiting_.empty()) return;
        const std::shared_ptr<EncodedChunk> chunk = std::move(waiting_.front());
        waiting_.pop_front();
        chunk->stage = EncodedChunk::running;
        held.unlock();
        encode(*chunk);
        held.lock();
        chunk->stage = EncodedChunk::done;
        finished_.notify_all();
    }
}

void EncodeThreads::encode(EncodedChunk& chunk) {
    try {
        std::unique_ptr<LineState> state = states_.acquire();
        state->clear();
        if (chunk.kind == ChunkKind::lines)
            encode_lines(encoder_, chunk.bytes, chunk.length, chunk.options, *state);
        else
            chunk.valid = encode_text(encoder_, chunk.bytes, chunk.length, chunk.options, *state);
        chunk.count = state->ids.size();
        chunk.tokens = wide_ ? narrowed<int32_t>(state->ids.begin(), chunk.count)
                             : narrowed<uint16_t>(state->ids.begin(), chunk.count);
        chunk.sizes = std::move(state->sizes);
        chunk.unsure = std::move(state->unsure);
        chunk.blank = state->blank, chunk.empty = state->empty;
        states_.release(std::move(state));
    } catch (...) {
        chunk.error = std::current_exception();
    }
}

}  // namespace neox::data
