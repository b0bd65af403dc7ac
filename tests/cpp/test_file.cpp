// Reading and durable writing of files: what is refused, and what is left after a failure.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "data/file.h"
#include "disk_calls.h"
#include "expect.h"

using namespace data_test;
using neox::data::InputFile;
using neox::data::Mapping;
using neox::data::OutputFile;

namespace {

// Numbers of the open files and maps of this process whose path contains a text.
size_t open_files(const std::string& text) {
    size_t found = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
        found += path_of(std::stoi(entry.path().filename())).find(text) != std::string::npos;
    return found;
}

size_t maps(const std::string& text) {
    std::ifstream lines("/proc/self/maps");
    size_t found = 0;
    for (std::string line; std::getline(lines, line);) found += line.find(text) != std::string::npos;
    return found;
}

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
    EXPECT_EQ(open_files(folder / "") + open_files("/dev/null"), open_files("/dev/null"));
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
    put(folder / "file", {1, 2, 3, 4, 5});
    file.check_unchanged();
    put(folder / "file", {1, 2, 3, 4, 5, 6});  // also if it grew
    EXPECT_FAULT(file.check_unchanged(), "got=6 bytes; want=5 bytes, as when it was opened");
}

// Neither is left open, by an object that ends or for a program that the process starts.
void files_and_maps_are_closed() {
    const Folder folder;
    const std::string path = folder / "file";
    put(path, {1, 2, 3});
    {
        const InputFile file(path);
        const Mapping map(file);
        OutputFile output(folder / "file.partial", 4);
        EXPECT_EQ(maps(path), size_t{1});
        EXPECT_EQ(open_files(path), size_t{2});
        for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
            const int descriptor = std::stoi(entry.path().filename());
            if (path_of(descriptor).find(path) != std::string::npos)
                EXPECT((::fcntl(descriptor, F_GETFD) & FD_CLOEXEC) != 0);
        }
    }
    EXPECT_FAULT(OutputFile(path, 4, 100), "shorter");
    EXPECT_EQ(maps(path), size_t{0});
    EXPECT_EQ(open_files(path), size_t{0});
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

// A new file may be read by whom the umask allows.
void mode_of_a_new_file() {
    const Folder folder;
    for (const mode_t mask : {0, 022, 077}) {
        const mode_t before = ::umask(mask);
        const OutputFile file(folder / "file.partial", 4);
        ::umask(before);
        struct stat info{};
        ::stat((folder / "file.partial").c_str(), &info);
        EXPECT_EQ(info.st_mode & 0777, 0666 & ~mask);
    }
}

// A file that is continued at every length: what it had is seen again in full buffers, and what comes after is cut off.
void resumed_files() {
    std::vector<uint8_t> content(23);
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<uint8_t>(i + 1);
    for (const uint64_t buffer : {1, 4, 23, 100}) {
        for (uint64_t at = 1; at <= content.size(); ++at) {
            const Folder folder;
            put(folder / "file.partial", content);
            Watched file(folder / "file.partial", buffer, at);
            EXPECT_EQ(content_of(folder / "file.partial").size(), at);
            file.reread();
            EXPECT_EQ(file.size(), at);
            EXPECT_EQ(file.counts.size(), at / buffer);
            const uint8_t more[] = {201, 202, 203, 204, 205};
            file.write(more, sizeof more);
            file.sync();
            EXPECT_EQ(content_of(folder / "file.partial").size(), at + sizeof more);
            file.write(more, 2);
            file.publish(folder / "file");
            std::vector<uint8_t> wanted(content.begin(), content.begin() + static_cast<long>(at));
            wanted.insert(wanted.end(), more, more + sizeof more);
            wanted.insert(wanted.end(), more, more + 2);
            EXPECT(content_of(folder / "file") == wanted);
            EXPECT(file.bytes == wanted);
            for (size_t i = 0; i + 1 < file.counts.size(); ++i) EXPECT_EQ(file.counts[i], buffer);
        }
    }
    const Folder folder;
    put(folder / "file.partial", content);
    EXPECT_FAULT(OutputFile(folder / "file.partial", 4, 24), "got=23 bytes; want=at least 24");
    EXPECT_EQ(content_of(folder / "file.partial").size(), content.size());
    EXPECT_FAULT(OutputFile(folder / "absent.partial", 4, 1), "cannot open file");
    EXPECT_EQ(folder.num_files(), 1u);
}

// What publish and sync do, in which order, and that each step's failure is a Fault.
void durability() {
    const Folder folder;
    const std::string name = std::filesystem::path(folder / "x").parent_path().filename();
    const auto publish = [&] {
        OutputFile file(folder / "file.partial", 4);
        file.write("abcdef", 6);
        file.publish(folder / "file");
    };
    disk_calls.record();
    publish();
    disk_calls.stop();
    EXPECT(disk_calls.has(
        {"write file.partial", "write file.partial", "fsync file.partial", "rename file", "fsync " + name}));
    EXPECT(disk_calls.ends_with("write file.partial", "fsync file.partial"));
    const size_t calls = disk_calls.seen.size();
    for (size_t failing = 0; failing < calls; ++failing) {
        put(folder / "file", {9});
        disk_calls.record(failing);
        const std::string fault = fault_of(publish);
        disk_calls.stop();
        EXPECT(fault.find("Input/output error") != std::string::npos && fault.find("; disk") != std::string::npos);
        EXPECT(failing == calls - 1 || content_of(folder / "file") == std::vector<uint8_t>{9});
        EXPECT_EQ(folder.num_files(), 1u);
    }
    disk_calls.record(calls - 1, EINVAL);  // a file system that cannot sync a folder
    publish();
    disk_calls.record(calls - 3, EINVAL);  // but every one can sync a file
    EXPECT_FAULT(publish(), "cannot sync; where=" + (folder / "file.partial"));
    disk_calls.stop();

    OutputFile file(folder / "file.partial", 4);
    file.write("abcdef", 6);
    disk_calls.record();
    file.sync();
    disk_calls.stop();
    EXPECT(disk_calls.has({"write file.partial", "fdatasync file.partial"}));
    EXPECT(disk_calls.ends_with("write file.partial", "fdatasync file.partial"));
    EXPECT_EQ(content_of(folder / "file.partial").size(), size_t{6});
    disk_calls.record(1);
    EXPECT_FAULT(file.sync(), "cannot sync");
    disk_calls.stop();
}

// A call that a signal ends, or that transfers less: it continues from there.
void interrupted_and_short_calls() {
    const Folder folder;
    std::vector<uint8_t> content(100), back(100), part(40);
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<uint8_t>(i);
    disk_calls.record();
    disk_calls.at_most = 7, disk_calls.interrupting = true;
    OutputFile file(folder / "file.partial", 64);
    file.write(content.data(), content.size());
    file.flush();
    file.read_at(back.data(), 40, 30);
    file.publish(folder / "file");
    InputFile(folder / "file").read_at(part.data(), 40, 50);
    disk_calls.stop();
    EXPECT(content_of(folder / "file") == content);
    EXPECT(std::equal(back.begin(), back.begin() + 40, content.begin() + 30));
    EXPECT(std::equal(part.begin(), part.end(), content.begin() + 50));
    EXPECT_FAULT(file.read_at(back.data(), 2, 99), "cannot read back");
}

void folders_of_paths() {
    const Folder folder;
    const std::filesystem::path before = std::filesystem::current_path();
    std::filesystem::create_directory(folder / "inner");
    std::filesystem::current_path(folder / "inner");
    disk_calls.record();
    for (const char* path : {"file", "./file", "../file", "/file"}) neox::data::sync_folder_of(path);
    neox::data::sync_folder_of(folder / "inner/file");
    disk_calls.stop();
    std::filesystem::current_path(before);
    const std::string outer = "fsync " + std::filesystem::path(folder / "x").parent_path().filename().string();
    EXPECT(disk_calls.seen == (std::vector<std::string>{"fsync inner", "fsync inner", outer, "fsync ", "fsync inner"}));
    EXPECT_FAULT(neox::data::sync_folder_of(folder / "absent/file"),
                 "cannot open folder; where=" + (folder / "absent"));
}

void removals() {
    const Folder folder;
    put(folder / "file", {1});
    neox::data::remove_if_there(folder / "file");
    neox::data::remove_if_there(folder / "file");
    EXPECT_EQ(folder.num_files(), 0u);
    std::filesystem::create_directory(folder / "inner");
    EXPECT_FAULT(neox::data::remove_if_there(folder / "inner"), "cannot remove; where=" + (folder / "inner"));
    EXPECT_EQ(folder.num_files(), 1u);
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
    files_and_maps_are_closed();
    mode_of_a_new_file();
    resumed_files();
    durability();
    interrupted_and_short_calls();
    folders_of_paths();
    removals();
    full_disk();
    return tally.finish();
}
