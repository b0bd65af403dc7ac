// Reading and durable writing of files: what is refused, and what is left after a failure.
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "data/file.h"
#include "expect.h"

using namespace data_test;
using neox::data::InputFile;
using neox::data::Mapping;
using neox::data::OutputFile;

namespace {

void inputs_that_are_refused() {
    const Folder folder;
    const auto open = [&](const std::string& name) { InputFile file(folder / name); };
    EXPECT_FAULT(open("absent"), "No such file");
    ::mkdir((folder / "folder").c_str(), 0755);
    EXPECT_FAULT(open("folder"), "a folder");
    ::mkfifo((folder / "fifo").c_str(), 0644);
    EXPECT_FAULT(open("fifo"), "a FIFO");  // without waiting for a writer
    ::symlink("nowhere", (folder / "link").c_str());
    EXPECT_FAULT(open("link"), "No such file");
    EXPECT_FAULT(open(std::string(300, 'x')), "File name too long");
    EXPECT_FAULT(InputFile("/dev/null"), "a device");
    put(folder / "file", {1, 2, 3});
    EXPECT_FAULT(open("file/below"), "Not a directory");
}

void reads_and_maps() {
    const Folder folder;
    put(folder / "file", {1, 2, 3, 4, 5});
    const InputFile file(folder / "file");
    EXPECT_EQ(file.size_at_open(), 5u);
    uint8_t out[5];
    file.read_at(out, 3, 2);
    EXPECT(out[0] == 3 && out[2] == 5);
    EXPECT_FAULT(file.read_at(out, 3, 3), "beyond the end");
    EXPECT_FAULT(file.read_at(out, 1, uint64_t{1} << 40), "beyond the end");
    EXPECT_EQ(Mapping(file).bytes()[4], 5);
    put(folder / "empty", {});
    EXPECT(Mapping(InputFile(folder / "empty")).bytes() == nullptr);
    ::truncate((folder / "file").c_str(), 2);
    EXPECT_FAULT(file.check_unchanged(), "changed while it was open");
    EXPECT_FAULT(file.read_at(out, 5, 0), "changed while it was open");
}

// Records each written buffer.
class Watched : public OutputFile {
  public:
    using OutputFile::OutputFile;
    std::vector<uint64_t> counts;
    std::vector<uint8_t> bytes;

  protected:
    void on_buffer_written(const uint8_t* from, uint64_t count) override {
        counts.push_back(count);
        bytes.insert(bytes.end(), from, from + count);
    }
};

void writes_by_buffers() {
    for (const uint64_t buffer : {1, 3, 7, 64, 1000}) {
        const Folder folder;
        std::vector<uint8_t> wanted(257);
        for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = static_cast<uint8_t>(i);
        Watched file(folder / "file.partial", buffer);
        for (size_t at = 0, step = 1; at < wanted.size(); at += step, step = 2 * step % 61 + 1) {
            step = std::min(step, wanted.size() - at);
            file.write(wanted.data() + at, step);
            EXPECT_EQ(file.size(), at + step);
        }
        file.flush();
        EXPECT(file.bytes == wanted);
        for (size_t i = 0; i + 1 < file.counts.size(); ++i) EXPECT_EQ(file.counts[i], buffer);
        file.write_at("\xff\xfe", 2, 100);
        wanted[100] = 0xff, wanted[101] = 0xfe;
        uint8_t back[2];
        file.read_at(back, 2, 100);
        EXPECT(back[0] == 0xff && back[1] == 0xfe);
        file.publish(folder / "file");
        EXPECT(content_of(folder / "file") == wanted);
        EXPECT_EQ(folder.num_files(), 1u);
    }
}

void nothing_is_left_without_publish() {
    const Folder folder;
    put(folder / "old", {9});
    {
        OutputFile file(folder / "old.partial", 4);
        file.write("abcdefgh", 8);
        EXPECT(content_of(folder / "old") == std::vector<uint8_t>{9});
    }
    EXPECT_EQ(folder.num_files(), 1u);
    put(folder / "target", {7});
    ::symlink("target", (folder / "link.partial").c_str());
    EXPECT_FAULT(OutputFile(folder / "link.partial", 4), "cannot create file");  // never writes through a symbolic link
    EXPECT(content_of(folder / "target") == std::vector<uint8_t>{7});
    EXPECT_FAULT(OutputFile(folder / "no/such/folder", 4), "disk");
}

void one_writer_at_a_time() {
    const Folder folder;
    const std::string partial = folder / "file.partial";
    const uint8_t letters[4] = {'a', 'b', 'c', 'd'};
    {
        OutputFile first(partial, 4);
        first.write(letters, sizeof letters);
        EXPECT_FAULT(OutputFile(partial, 4), "another process is writing this file; where=" + partial);
        EXPECT_FAULT(OutputFile(partial, 4, 2), "another process is writing this file");
        EXPECT_EQ(content_of(partial).size(), sizeof letters);
        first.publish(folder / "file");
        OutputFile second(partial, 4);  // the first one already has its final name and is not changed
        second.write(letters, 1);
        second.keep();
    }
    EXPECT_EQ(content_of(folder / "file").size(), sizeof letters);
    OutputFile again(partial, 4);  // the file of a writer that ended is no longer locked
    EXPECT_EQ(content_of(partial).size(), size_t{0});
}

void full_disk() {
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    const rlimit tight{100, before.rlim_max};
    const Folder folder;
    {
        OutputFile file(folder / "file.partial", 64);
        const std::vector<uint8_t> bytes(1000, 1);
        ::setrlimit(RLIMIT_FSIZE, &tight);
        EXPECT_FAULT(file.write(bytes.data(), bytes.size()), "cannot write; where=" + (folder / "file.partial"));
        EXPECT_FAULT(file.publish(folder / "file"), "; disk");
        ::setrlimit(RLIMIT_FSIZE, &before);
    }
    EXPECT_EQ(folder.num_files(), 0u);
}

}  // namespace

int main() {
    inputs_that_are_refused();
    reads_and_maps();
    writes_by_buffers();
    nothing_is_left_without_publish();
    one_writer_at_a_time();
    full_disk();
    return tally.finish();
}
