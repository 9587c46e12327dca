// Test of the Intel AMX emulator (amx_emulator.c), which belongs to the tests, never to the product. Build and run:
//     gcc -O2 -shared -fPIC -o libamx_emulator.so amx_emulator.c
//     g++ -O2 -mamx-tile -mamx-int8 -mamx-bf16 test_emulator.cpp -o test -L. -lamx_emulator -Wl,-rpath,'$ORIGIN' -pthread
#include <immintrin.h>
#include <signal.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

extern "C" int amx_emulator_install(void);
extern "C" uint64_t amx_emulator_instructions(void);

#define CHECK(x) \
    do { if (!(x)) { fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

struct Random {
    uint64_t s;
    uint32_t next() { s ^= s << 13; s ^= s >> 7; s ^= s << 17; return uint32_t(s >> 16); }
    int below(int n) { return int(next() % unsigned(n)); }
};

struct alignas(64) Config { uint8_t palette, start, zero[14]; uint16_t colsb[8], zero1[8]; uint8_t rows[8], zero2[8]; };

static void load_config(const Config &c)
{
    asm volatile("" ::: "memory");  // gcc 12 believes that only eight bytes are read
    _tile_loadconfig(&c);
}

// A handler around the emulator's own, to count traps and to see how far a trap got.
static struct sigaction emulator;
static std::atomic<uint64_t> traps;
static thread_local uint64_t last_rip;
static void observe(int sig, siginfo_t *info, void *context)
{
    traps++;
    emulator.sa_sigaction(sig, info, context);
    last_rip = uint64_t(static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_RIP]);
}

static void test_config()
{
    Config c{}, out, zero{};
    c.palette = 1;
    for (int i = 0; i < 8; i++) c.rows[i] = uint8_t(16 - i), c.colsb[i] = uint16_t(64 - 7 * i);
    c.rows[6] = 0, c.colsb[6] = 0;
    uint64_t before = amx_emulator_instructions();
    load_config(c);
    _tile_storeconfig(&out);
    CHECK(!memcmp(&out, &c, 64));
    c.start = 3;
    load_config(c);
    _tile_storeconfig(&out);
    CHECK(out.start == 3);
    _tile_zero(2);
    _tile_storeconfig(&out);
    CHECK(out.start == 0);
    _tile_release();
    _tile_storeconfig(&out);
    CHECK(!memcmp(&out, &zero, 64));
    c.start = 0;
    load_config(c);
    load_config(zero);  // palette 0 also releases
    _tile_storeconfig(&out);
    CHECK(!memcmp(&out, &zero, 64));
    static Config fixed = c;
    memset(&out, 0xAA, 64);
    asm volatile("ldtilecfg %0\n\tsttilecfg %1" :: "m"(fixed), "m"(out) : "memory");  // RIP-relative
    asm volatile("" ::: "memory");
    _tile_storeconfig(&out);
    CHECK(!memcmp(&out, &fixed, 64));
    CHECK(amx_emulator_instructions() - before == 14);
}

#define TILE_CASE(n) \
    case n: \
        if (zero) _tile_zero(n); \
        else if (stream) _tile_stream_loadd(n, from, stride); \
        else _tile_loadd(n, from, stride); \
        _tile_stored(n, to, to_stride); \
        break;

static void test_moves(Random &random)
{
    static thread_local uint8_t source[16 * 256], target[16 * 256], expected[16 * 256];
    for (int round = 0; round < 300; round++) {
        Config c{};
        c.palette = 1;
        for (auto &x : c.rows) x = uint8_t(1 + random.below(16));
        for (auto &x : c.colsb) x = uint16_t(1 + random.below(64));
        load_config(c);
        for (auto &x : source) x = uint8_t(random.next());
        for (auto &x : target) x = uint8_t(random.next());
        memcpy(expected, target, sizeof target);
        int tile = random.below(8), stride = random.below(192), to_stride = 64 + random.below(128);
        bool zero = random.below(8) == 0, stream = random.below(2), negative = random.below(2);
        uint8_t *from = source, *to = target;
        if (negative) from += 15 * 192, stride = -stride;
        for (int r = 0; r < c.rows[tile]; r++)
            for (int b = 0; b < c.colsb[tile]; b++) expected[r * to_stride + b] = zero ? 0 : from[r * stride + b];
        switch (tile) {
            TILE_CASE(0) TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4) TILE_CASE(5) TILE_CASE(6) TILE_CASE(7)
        }
        CHECK(!memcmp(target, expected, sizeof target));
    }
    // Address forms: every scale, displacement sizes, high registers, R12 and R13 bases, no index.
    Config c{};
    c.palette = 1, c.rows[3] = 2, c.colsb[3] = 8;
    load_config(c);
    for (auto &x : source) x = uint8_t(random.next());
    uint64_t out[2];
#define PREPARED(setup, operand, first, second) \
    asm volatile(setup "\n\ttileloadd " operand ", %%tmm3\n\ttilestored %%tmm3, (%1,%2,1)" \
                 :: "r"(source + 256), "r"(out), "r"(8L) : "memory", "rax", "rcx", "r9", "r12", "r13"); \
    CHECK(!memcmp(&out[0], source + 256 + (first), 8) && !memcmp(&out[1], source + 256 + (second), 8));
    PREPARED("mov $24, %%eax", "(%0,%%rax,1)", 0, 24)
    PREPARED("mov $24, %%r9d", "(%0,%%r9,2)", 0, 48)
    PREPARED("mov %0, %%r12\n\tmov $24, %%r9d", "17(%%r12,%%r9,4)", 17, 113)
    PREPARED("mov %0, %%r13\n\tmov $24, %%r12d", "(%%r13,%%r12,8)", 0, 192)
    PREPARED("mov %0, %%r13\n\tmov $-3, %%r12", "-100(%%r13,%%r12,8)", -100, -124)
    PREPARED("mov $24, %%ecx", "300(%0,%%rcx,1)", 300, 324)
    PREPARED("mov %0, %%rax", "-130(%%rax)", -130, -130)            // no index: stride 0
#undef PREPARED
    _tile_release();
}

// ---- Dot products: C (tile 0) += A (tile 1) * B (tile 2) ----

struct Shape { int m, k, n; };  // k and n in dwords
struct Operands { alignas(64) uint32_t c[16][16], a[16][16], b[16][16]; };

static Shape configure(Random &random, bool full)
{
    Shape s = full ? Shape{16, 16, 16} : Shape{1 + random.below(16), 1 + random.below(16), 1 + random.below(16)};
    Config c{};
    c.palette = 1;
    c.rows[0] = c.rows[1] = uint8_t(s.m), c.rows[2] = uint8_t(s.k);
    c.colsb[1] = uint16_t(4 * s.k), c.colsb[0] = c.colsb[2] = uint16_t(4 * s.n);
    load_config(c);
    return s;
}

static int32_t byte_of(uint32_t dword, int i, bool is_signed)
{
    uint8_t x = uint8_t(dword >> 8 * i);
    return is_signed ? int8_t(x) : x;
}

static void test_int8(Random &random, int rounds)
{
    static thread_local Operands o;
    static thread_local uint32_t out[16][16], expected[16][16];
    for (int round = 0; round < rounds; round++) {
        Shape s = configure(random, round % 4 == 0);
        static const uint8_t extremes[4] = {0x80, 0x7F, 0xFF, 0x00};
        for (uint32_t *p = &o.c[0][0]; p < &o.c[0][0] + 3 * 256; p++) {
            *p = random.next();
            if (round % 3 == 0)
                for (int i = 0; i < 4; i++) reinterpret_cast<uint8_t *>(p)[i] = extremes[random.below(4)];
            if (round % 3 == 1) *p = round % 2 ? 0x80808080u : 0xFFFFFFFFu;
        }
        int kind = random.below(4);  // bit 1: A signed, bit 0: B signed
        memcpy(out, o.c, sizeof out);
        memcpy(expected, o.c, sizeof out);
        for (int i = 0; i < s.m; i++)
            for (int j = 0; j < s.n; j++)
                for (int k = 0; k < s.k; k++)
                    for (int x = 0; x < 4; x++)
                        expected[i][j] += uint32_t(byte_of(o.a[i][k], x, kind & 2) * byte_of(o.b[k][j], x, kind & 1));
        _tile_loadd(0, o.c, 64);
        _tile_loadd(1, o.a, 64);
        _tile_stream_loadd(2, o.b, 64);
        if (kind == 3) _tile_dpbssd(0, 1, 2);
        if (kind == 2) _tile_dpbsud(0, 1, 2);
        if (kind == 1) _tile_dpbusd(0, 1, 2);
        if (kind == 0) _tile_dpbuud(0, 1, 2);
        _tile_stored(0, out, 64);
        CHECK(!memcmp(out, expected, sizeof out));
    }
}

static float to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

static uint32_t random_float(Random &random, int mode)
{
    uint32_t x = random.next();
    switch (mode) {
    case 0: return (x & 0x807FFFFF) | uint32_t(120 + random.below(16)) << 23;  // ordinary magnitudes
    case 1: return (x & 0x807FFFFF) | uint32_t(60 + random.below(8)) << 23;    // products around the smallest normal
    case 2: return (x & 0x807FFFFF) | uint32_t(random.below(3)) << 23;         // denormals and their neighbours
    case 3: return (x & 0x807FFFFF) | uint32_t(180 + random.below(20)) << 23;  // overflows
    default: return random.below(12) ? random_float(random, random.below(4)) :
                    (x & 0x80000000) | (random.below(2) ? 0x7F800000 : 0x7FC00000 | (x & 0x7F0000));
    }
}

static void test_bf16(Random &random, int rounds, bool threaded)
{
    static thread_local Operands o;
    static thread_local uint32_t out[16][16];
    int flushed = 0, nans = 0, infinities = 0;
    for (int round = 0; round < rounds; round++) {
        Shape s = configure(random, round % 4 == 0);
        int mode = round % 6;
        for (uint32_t *p = &o.c[0][0]; p < &o.c[0][0] + 3 * 256; p++) {
            *p = random_float(random, mode);
            if (p >= &o.a[0][0]) *p = (*p & 0xFFFF0000) | random_float(random, mode) >> 16;
            else if (mode == 1) *p = random_float(random, 2);
        }
        memcpy(out, o.c, sizeof out);
        unsigned mxcsr = _mm_getcsr(), hostile = (mxcsr & ~0x3Fu) | 0x6000;  // truncation, no flags raised
        _tile_loadd(0, o.c, 64);
        _tile_loadd(1, o.a, 64);
        _tile_loadd(2, o.b, 64);
        _mm_setcsr(hostile);
        _tile_dpbf16ps(0, 1, 2);
        CHECK(_mm_getcsr() == hostile);
        _mm_setcsr(mxcsr);
        _tile_stored(0, out, 64);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                if (i >= s.m || j >= s.n) { CHECK(out[i][j] == o.c[i][j]); continue; }
                float part[2] = {0, 0};
                for (int k = 0; k < s.k; k++)
                    for (int x = 0; x < 2; x++) {
                        float a = to_float(x ? o.a[i][k] & 0xFFFF0000 : o.a[i][k] << 16);
                        float b = to_float(x ? o.b[k][j] & 0xFFFF0000 : o.b[k][j] << 16);
                        float exact = std::fma(flush(a), flush(b), part[x]);
                        flushed += exact != flush(exact);
                        part[x] = flush(exact);
                    }
                float r = flush(flush(to_float(o.c[i][j])) + flush(part[0] + part[1])), got = to_float(out[i][j]);
                nans += std::isnan(r), infinities += std::isinf(r);
                CHECK(std::isnan(r) ? std::isnan(got) : to_bits(r) == out[i][j]);
            }
    }
    if (!threaded) {
        printf("bf16: the reference flushed %d results, gave %d NaN and %d infinities\n", flushed, nans, infinities);
        CHECK(flushed > 1000 && nans > 1000 && infinities > 1000);
    }
}

// ---- Scalar instructions after an AMX instruction, against the processor ----

struct Registers { uint64_t a, b, c, flags, end; uint64_t memory[4]; };
struct Scalar { void (*native)(Registers &), (*stepped)(Registers &); const char *text; bool steps; };

#define RUN(before, text) [](Registers &r) { \
    register uint64_t c asm("r12") = r.c; \
    asm volatile("lea -128(%%rsp), %%rsp\n\tpush %%rdx\n\tpopfq\n\t" before text "\n77:\tpushfq\n\tpop %%rdx\n\t" \
                 "lea 128(%%rsp), %%rsp\n\tlea 77b(%%rip), %%rdi" \
                 : "+a"(r.a), "+b"(r.b), "+r"(c), "+d"(r.flags), "=&D"(r.end) : "S"(r.memory) \
                 : "memory", "cc", "r13"); \
    r.c = c; }
#define SCALAR_(text, steps) {RUN("", text), RUN("tilezero %%tmm0\n\t", text), text, steps},
#define S(text) SCALAR_(text, true)
#define N(text) SCALAR_(text, false)
#define BOTH(op) S(op " %%rbx, %%rax") S(op " %%ebx, %%eax") S(op " %%r12, %%rbx") S(op " %%eax, %%r12d")
#define LOADS(op) S(op " 8(%%rsi), %%rax") S(op " 16(%%rsi), %%r12d")
#define IMMEDIATES(op) S(op " $5, %%rax") S(op " $-128, %%r12d") S(op " $0x12345678, %%rax") \
    S(op " $-70000, %%rbx") S(op " $70000, %%eax") S(op " $0x7FFFFFFF, %%r12")
#define ALU(op) BOTH(op) LOADS(op) IMMEDIATES(op)
#define JUMP(cc) S("j" cc " 1f\n\tlea 1(%%rax), %%rax\n1:") S("%{disp32%} j" cc " 1f\n\tlea 3(%%rax), %%rax\n1:")

static const Scalar scalars[] = {
    ALU("add") ALU("sub") ALU("and") ALU("or") ALU("xor") ALU("cmp")
    BOTH("test") BOTH("mov") LOADS("mov")
    S(".byte 0x48, 0x03, 0xC3") S(".byte 0x48, 0x2B, 0xC3") S(".byte 0x4C, 0x3B, 0xE0")  // add, sub, cmp: reg, r/m
    S("mov -8(%%rsp), %%rax") S("cmpq $7, 8(%%rsi)") S("cmpl $-7, (%%rsi)") S("cmp %%rax, (%%rsi)")
    S("inc %%rax") S("inc %%r12d") S("dec %%rbx") S("dec %%eax")
    S("mov $77, %%eax") S("mov $0x89ABCDEF, %%r12d") S("mov %%rax, 8(%%rsi)") S("mov %%r12d, 20(%%rsi)")
    S("movslq %%eax, %%r12") S("movslq 4(%%rsi), %%rax")
    S("lea (%%rax,%%rbx,4), %%r12") S("lea -9(%%r12,%%rax), %%ebx") S("lea 0x1234(,%%rbx,8), %%rax")
    S("lea 0x4321(%%r12), %%r12") S("lea 77f(%%rip), %%rax") S("mov %%r12, %%r13\n\tlea (%%r13,%%r12,2), %%rax")
    S("cmpl $3, 77f(%%rip)") S("cmpl $70000, 77f(%%rip)") S("mov 77f(%%rip), %%eax")
    S("prefetcht0 (%%rax)") S("prefetcht1 64(%%r12)") S("prefetcht2 (%%rax,%%rbx,2)") S("prefetchnta 4096(%%rsi)")
    S("nop") S("xchg %%ax, %%ax") S("nopw 0(%%rax,%%rax,1)") S(".p2align 5")
    S(".byte 0x66, 0x66, 0x2E, 0x0F, 0x1F, 0x84, 0, 0, 0, 0, 0")
    JUMP("o") JUMP("no") JUMP("b") JUMP("ae") JUMP("e") JUMP("ne") JUMP("be") JUMP("a")
    JUMP("s") JUMP("ns") JUMP("p") JUMP("np") JUMP("l") JUMP("ge") JUMP("le") JUMP("g") JUMP("mp")
    S("and $15, %%eax\n1:\tadd %%rbx, %%r12\n\tlea (%%r12,%%r12,4), %%r12\n\tdec %%rax\n\tjns 1b")
    N("adc %%rbx, %%rax") N("sbb %%rbx, %%rax") N("xchg %%r8, %%rax\n\txchg %%r8, %%rax") N("neg %%rax")
    N("add %%rax, 8(%%rsi)") N("movabs $0x123456789, %%rax") N("sub $64, %%rsp\n\tadd $64, %%rsp")
    N("mov %%rsp, %%r13\n\tlea -512(%%rsp), %%rsp\n\tmov %%rax, (%%rsp)\n\tmov %%r13, %%rsp") N("imul %%rbx, %%rax")
    N("not %%eax") N("add %%bl, %%al") N("add %%bx, %%ax") N("push %%rax\n\tpop %%r12") N("notw %%ax")
};

static void test_scalar(Random &random)
{
    Config c{};
    c.palette = 1, c.rows[0] = 1, c.colsb[0] = 4;
    load_config(c);
    static const uint64_t edges[] = {0, 1, ~0ull, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, ~0ull >> 1, 1ull << 63};
    int stepped = 0, left = 0;
    for (const Scalar &s : scalars)
        for (int round = 0; round < 60; round++) {
            Registers native{}, emulated;
            uint64_t *p = &native.a;
            for (int i = 0; i < 9; i++)
                p[i] = random.below(2) ? edges[random.below(8)] : uint64_t(random.next()) << 32 | random.next();
            native.flags = 0x202 | (random.next() & 0x8D5);
            native.end = 0;
            emulated = native;
            s.native(native);
            last_rip = 0;
            s.stepped(emulated);
            // The two copies lie at different addresses and what they read there differs, so skip RIP-relative results.
            if (!strstr(s.text, "rip")) {
                native.end = emulated.end;
                if (memcmp(&native, &emulated, sizeof native)) fprintf(stderr, "%s\n", s.text);
                CHECK(!memcmp(&native, &emulated, sizeof native));
            } else if (strstr(s.text, "lea")) {
                CHECK(emulated.a == emulated.end && native.a == native.end);
            } else if (strstr(s.text, "mov")) {
                CHECK(uint32_t(emulated.a) == *reinterpret_cast<uint32_t *>(emulated.end));
            } else {
                CHECK((native.flags & 0x8D5) == (emulated.flags & 0x8D5));
            }
            if ((last_rip == emulated.end) != s.steps) fprintf(stderr, "stepping of: %s\n", s.text);
            CHECK((last_rip == emulated.end) == s.steps);
            s.steps ? stepped++ : left++;
        }
    _tile_release();
    printf("scalar: %d runs stepped over and %d left to the processor equal native execution\n", stepped, left);
}

// ---- Crashes must stay crashes ----

template <class F> static int status_of(F f)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(3);
        f();
        _exit(0);
    }
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return status;
}

static void test_crashes()
{
    auto killed_by = [](int status, int sig) { return WIFSIGNALED(status) && WTERMSIG(status) == sig; };
    auto exits = [](int status, int code) { return WIFEXITED(status) && WEXITSTATUS(status) == code; };
    CHECK(killed_by(status_of([] { asm volatile("ud2"); }), SIGILL));
    CHECK(killed_by(status_of([] { asm volatile(".byte 0xC4, 0xE2, 0x7A, 0x49, 0xC0"); }), SIGILL));  // undefined 49
    CHECK(killed_by(status_of([] { signal(SIGILL, SIG_IGN), amx_emulator_install(); asm volatile("ud2"); }), SIGILL));
    CHECK(killed_by(status_of([] { kill(getpid(), SIGILL); }), SIGILL));
    CHECK(exits(status_of([] { signal(SIGILL, SIG_IGN), amx_emulator_install(); kill(getpid(), SIGILL); }), 0));
    CHECK(exits(status_of([] { signal(SIGILL, _exit), amx_emulator_install(); asm volatile("ud2"); }), SIGILL));
    CHECK(killed_by(status_of([] { _tile_zero(0); }), SIGABRT));  // nothing configured
    CHECK(killed_by(status_of([] { Config c{}; c.palette = 2; load_config(c); }), SIGABRT));
    CHECK(killed_by(status_of([] { Config c{}; c.palette = c.colsb[0] = 1, c.rows[0] = 17; load_config(c); }), SIGABRT));
    CHECK(killed_by(status_of([] { Config c{}; c.palette = 1; c.rows[0] = 1; load_config(c); }), SIGABRT));
    CHECK(killed_by(status_of([] { Config c{}; c.palette = 1; c.zero1[3] = 1; load_config(c); }), SIGABRT));
    CHECK(exits(status_of([] { Config c{}; c.palette = 1; c.rows[0] = 1, c.colsb[0] = 4; load_config(c); }), 0));
}

// ---- Speed: 2x2 tiles of C, the usual inner loop ----

template <bool BF16> static void benchmark()
{
    constexpr int depth = 256;
    static int8_t a[2][depth][1024], b[2][depth][1024];
    static int32_t c[4][256];
    Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.rows[i] = 16, config.colsb[i] = 64;
    load_config(config);
    uint64_t traps_before = traps, instructions_before = amx_emulator_instructions();
    auto start = std::chrono::steady_clock::now();
    double seconds = 0, products = 0;
    while (seconds < 0.5) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int k = 0; k < depth; k++) {
            _tile_loadd(4, a[0][k], 64); _tile_loadd(6, b[0][k], 64);
            _tile_loadd(5, a[1][k], 64); _tile_loadd(7, b[1][k], 64);
            if (BF16) {
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
            }
        }
        _tile_stored(0, c[0], 64); _tile_stored(1, c[1], 64); _tile_stored(2, c[2], 64); _tile_stored(3, c[3], 64);
        products += 4.0 * depth;
        seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    printf("%s: %.1f GOP/s, %.1f AMX instructions per trap\n", BF16 ? "bf16" : "int8",
           products * (BF16 ? 16384 : 32768) / seconds * 1e-9,
           double(amx_emulator_instructions() - instructions_before) / double(traps - traps_before));
    // The price of a trap: a tilezero followed by something that is never stepped over.
    start = std::chrono::steady_clock::now();
    for (int i = 0; i < 20000; i++) { _tile_zero(0); asm volatile("cld"); }
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (!BF16) printf("one trap: %.2f us\n", seconds * 1e6 / 20000);
    _tile_release();
}

int main()
{
    CHECK(amx_emulator_install() == 0);
    CHECK(amx_emulator_install() == 0);
    CHECK(sigaction(SIGILL, nullptr, &emulator) == 0);
    test_crashes();  // before the observer, which would be the emulator's previous handler after a new installation
    struct sigaction observer = emulator;
    observer.sa_sigaction = observe;
    CHECK(sigaction(SIGILL, &observer, nullptr) == 0);

    Random random{88172645463325252ull};
    test_config();
    test_moves(random);
    test_int8(random, 400);
    test_bf16(random, 300, false);
    test_scalar(random);
    std::vector<std::thread> threads;
    for (uint64_t i = 1; i <= 2; i++)
        threads.emplace_back([i] {
            Random r{i * 0x9E3779B97F4A7C15ull};
            for (int round = 0; round < 10; round++) test_moves(r), test_int8(r, 40), test_bf16(r, 20, true);
        });
    for (auto &t : threads) t.join();
    benchmark<false>();
    benchmark<true>();
    printf("all tests passed, %llu AMX instructions emulated in %llu traps\n",
           (unsigned long long)amx_emulator_instructions(), (unsigned long long)traps.load());
}
