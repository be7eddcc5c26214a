/* Pages of its own in private mappings of files, most of which hold what the file has: of its program's data and code, as a program that
 * patches itself leaves them, and of a file of data. A child shares most of them copy-on-write. DIR/where tells where they are.
 * argv[3]: MiB of other memory. When there is DIR/back it makes its page of the table what it was. When there is DIR/overwrite it writes all over the file of data, and its pages must not show that. */
#include "family.h"
#include <sys/wait.h>
#define PAGE 4096ul
#define DATA 64ul
#define TEXT 16ul
#define FILE_ 32ul
/* Word I of the table is TABLE + I, word I of the code CODE + I. */
#define TABLE 0x7461626c65000000ul
#define CODE 0x636f646500000000ul
__asm__(".pushsection .data\n.balign 4096\n.globl table\ntable:\n.set i, 0\n.rept 32768\n.quad 0x7461626c65000000 + i\n.set i, i + 1\n.endr\n.popsection\n"
        ".pushsection .text\n.balign 4096\n.globl code\ncode:\n.set i, 0\n.rept 8192\n.quad 0x636f646500000000 + i\n.set i, i + 1\n.endr\n.popsection\n");
extern volatile uint64_t table[], code[];
static volatile uint64_t *data, *tail;
static size_t tail_size;
static int overwritten, back;
/* What word I of page P was made: the page differs in its last word, is zero, or is as in the file. */
static uint64_t word(uint64_t base, size_t p, size_t i, size_t differs, size_t zero) {
    if (p == zero) return 0;
    return base + p * 512 + i + (p == differs && i == 511 ? 0x100000 : 0);
}
static void check(int child) {
    for (size_t p = 0; p < DATA; p++) for (size_t i = 0; i < 512; i++) SAME(table[p * 512 + i], word(TABLE, p, i, child ? 3 : back ? (size_t)-1 : 17, 30));
    for (size_t p = 0; p < TEXT; p++) for (size_t i = 0; i < 512; i++) SAME(code[p * 512 + i], word(CODE, p, i, 5, -1));
    /* Its second half was never written to: it shows the file. */
    for (size_t p = 0; p < FILE_; p++) for (size_t i = 0; i < 512; i++) SAME(data[p * 512 + i], word(TABLE, p, i, -1, -1) + (overwritten && p >= FILE_ / 2 ? 1 : 0));
    const char *end = (const char *)tail + tail_size;
    SAME(end[-1], 'x'); CHECK(zero(end, (PAGE - tail_size % PAGE) % PAGE));
}
static void overwrite(void) {
    int fd = open(in_dir("data"), O_RDWR | O_CLOEXEC); CHECK(fd >= 0);
    for (size_t i = 0; i < FILE_ * 512; i++) { uint64_t w = TABLE + i + 1; CHECK(pwrite(fd, &w, 8, i * 8) == 8); }
    close(fd);
}
int main(int argc, char **argv) {
    begin_family(argc, argv);
    size_t more = (argc > 3 ? atoi(argv[3]) : 0) * (1ul << 20);
    if (more) fill(map(more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), more, 5);
    int fd = open(in_dir("data"), O_RDWR | O_CREAT | O_CLOEXEC, 0600); CHECK(fd >= 0);
    for (size_t i = 0; i < FILE_ * 512; i += 512) { uint64_t page[512]; for (int j = 0; j < 512; j++) page[j] = TABLE + i + j; CHECK(write(fd, page, PAGE) == PAGE); }
    close(fd); fd = open(in_dir("data"), O_RDONLY | O_CLOEXEC);
    data = map(FILE_ * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0); close(fd);
    /* A page of the end of its program, with an `x` behind which there is nothing. */
    fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC); CHECK(fd >= 0);
    tail_size = lseek(fd, 0, SEEK_END) % PAGE; CHECK(tail_size);
    tail = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, lseek(fd, 0, SEEK_END) & ~(PAGE - 1)); close(fd);
    if (((char *)tail)[tail_size - 1] != 'x') bad("its program must end with an x");

    for (size_t p = 0; p < DATA; p++) table[p * 512] = table[p * 512];
    table[17 * 512 + 511] += 0x100000; memset((void *)(table + 30 * 512), 0, PAGE);
    CHECK(!mprotect((void *)code, TEXT * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
    for (size_t p = 0; p < TEXT; p++) code[p * 512 + 7] = code[p * 512 + 7];
    code[5 * 512 + 511] += 0x100000;
    CHECK(!mprotect((void *)code, TEXT * PAGE, PROT_READ | PROT_EXEC));
    for (size_t p = 0; p < FILE_ / 2; p++) data[p * 512] = data[p * 512];
    *tail = *tail;
    members = 1;
    pid_t child = fork(); CHECK(child >= 0);
    if (!child) {
        table[17 * 512 + 511] -= 0x100000; table[3 * 512 + 511] += 0x100000;
        for (;;) { overwritten = family->word[0]; __atomic_thread_fence(__ATOMIC_SEQ_CST); if (family->word[1] == overwritten) check(1); beat(0); nap(2); }
    }
    FILE *f = fopen(in_dir("where"), "we"); CHECK(f);
    fprintf(f, "%lx %lx %lx %lx %d\n", (long)table, (long)code, (long)data, (long)tail, child); CHECK(!fclose(f));
    for (;;) {
        if (!overwritten && !access(in_dir("overwrite"), F_OK)) { family->word[1] = 1; tick_all(); overwrite(); overwritten = 1; family->word[0] = 1; }
        if (!back && !access(in_dir("back"), F_OK)) { table[17 * 512 + 511] -= 0x100000; back = 1; }
        check(0); tick_all(); nap(5);
    }
}
