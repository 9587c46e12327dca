/* Intel AMX emulator by SIGILL trapping: a helper of the tests, never part of the product.
 *
 * On an x86-64 Linux machine without AMX, amx_emulator_install() makes the instructions of AMX-TILE, AMX-INT8 and
 * AMX-BF16 work as the Intel SDM describes them. Build: gcc -O2 -shared -fPIC -o libamx_emulator.so amx_emulator.c
 *
 * Known limits: no segment or address-size prefixes; a memory fault inside an emulated instruction is reported at an
 * address of this library; a signal handler that itself uses tiles shares them with the code that it interrupted. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xmmintrin.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, LANES = 16, MAX_STEPS = 2000, RSP = 4 };
enum { CF = 1 << 0, PF = 1 << 2, AF = 1 << 4, ZF = 1 << 6, SF = 1 << 7, OF = 1 << 11 };

struct config { /* the memory image of LDTILECFG and STTILECFG, 64 bytes */
    uint8_t palette, start_row, reserved0[14];
    uint16_t colsb[TILES], reserved1[8];
    uint8_t rows[TILES], reserved2[8];
};
struct tile { uint8_t row[ROWS][ROW_BYTES]; };

/* Whatever lies outside a tile's configured shape is zero: LDTILECFG clears everything and no other instruction
 * writes there, so that zeroing the upper rows and columns on every write, as the SDM has it, is implied. */
static __thread struct { struct config config; struct tile tile[TILES]; } state;
static atomic_uint_fast64_t emulated;
static struct sigaction previous;

static void require(bool condition, const char *violated)
{
    if (!condition) dprintf(2, "amx_emulator: illegal AMX operation: %s\n", violated), abort();
}

static struct tile *valid_tile(unsigned n)
{
    require(state.config.rows[n] != 0, "the tile is not configured"); /* no tile is while no configuration is loaded */
    return &state.tile[n];
}

static void load_config(const void *from)
{
    struct config c;
    memcpy(&c, from, sizeof c);
    require(c.palette <= 1, "unknown palette");
    memset(&state, 0, sizeof state);
    if (c.palette == 0) return;
    for (int n = 0; n < 14; n++)
        require(!c.reserved0[n] && (n >= 8 || !(c.reserved1[n] | c.reserved2[n])), "a reserved byte is not zero");
    for (int n = 0; n < TILES; n++)
        require(c.rows[n] <= ROWS && c.colsb[n] <= ROW_BYTES && !c.rows[n] == !c.colsb[n], "bad tile shape");
    state.config = c;
}

static void move_tile(unsigned n, uint64_t base, uint64_t stride, bool store)
{
    struct tile *t = valid_tile(n);
    for (unsigned r = state.config.start_row; r < state.config.rows[n]; r++) {
        void *memory = (void *)(base + r * stride), *row = t->row[r];
        memcpy(store ? memory : row, store ? row : memory, state.config.colsb[n]);
    }
}

/* gcc -O2 vectorizes the loops over LANES. B is unpacked once, to wide[k][position in the dword][column]. */
#define KERNEL __attribute__((noinline, target("avx2,fma"))) static void

KERNEL dot_int8(struct tile *c, const struct tile *a, const struct tile *b, int m, int k, unsigned pp)
{
    uint32_t a_sign = pp & 2 ? 0x80 : 0, b_sign = pp & 1 ? 0x80 : 0; /* (x ^ 0x80) - 0x80 extends the sign of a byte */
    uint32_t wide[ROWS][4][LANES], dwords[LANES], sum[LANES], x[4]; /* unsigned: sums wrap modulo 2^32 */
    for (int j = 0; j < k; j++) {
        memcpy(dwords, b->row[j], ROW_BYTES);
        for (int i = 0; i < 4; i++)
            for (int n = 0; n < LANES; n++) wide[j][i][n] = ((dwords[n] >> 8 * i & 0xFF) ^ b_sign) - b_sign;
    }
    for (int r = 0; r < m; r++) {
        memcpy(sum, c->row[r], ROW_BYTES);
        for (int j = 0; j < k; j++) {
            uint32_t (*y)[LANES] = wide[j];
            for (int i = 0; i < 4; i++) x[i] = (a->row[r][4 * j + i] ^ a_sign) - a_sign;
            for (int n = 0; n < LANES; n++) sum[n] += x[0] * y[0][n] + x[1] * y[1][n] + x[2] * y[2][n] + x[3] * y[3][n];
        }
        memcpy(c->row[r], sum, ROW_BYTES);
    }
}

static inline float as_float(uint32_t bits) { return ((union { uint32_t u; float f; }){bits}).f; }

/* Even and odd products accumulate apart, from zero, by fused multiply-adds; their sum is then added to C. */
KERNEL dot_bf16(struct tile *c, const struct tile *a, const struct tile *b, int m, int k, int colsb)
{
    uint32_t dwords[LANES];
    float wide[ROWS][2][LANES], sum[LANES];
    for (int j = 0; j < k; j++) {
        memcpy(dwords, b->row[j], ROW_BYTES);
        for (int n = 0; n < LANES; n++)
            wide[j][0][n] = as_float(dwords[n] << 16), wide[j][1][n] = as_float(dwords[n] & 0xFFFF0000);
    }
    for (int r = 0; r < m; r++) {
        float even[LANES] = {0}, odd[LANES] = {0};
        memcpy(dwords, a->row[r], ROW_BYTES);
        for (int j = 0; j < k; j++) {
            float x_even = as_float(dwords[j] << 16), x_odd = as_float(dwords[j] & 0xFFFF0000);
            for (int n = 0; n < LANES; n++) even[n] = __builtin_fmaf(x_even, wide[j][0][n], even[n]);
            for (int n = 0; n < LANES; n++) odd[n] = __builtin_fmaf(x_odd, wide[j][1][n], odd[n]);
        }
        memcpy(sum, c->row[r], ROW_BYTES);
        for (int n = 0; n < LANES; n++) sum[n] += even[n] + odd[n];
        memcpy(c->row[r], sum, colsb); /* not all of it: an infinity in A times the zeros beside B is a NaN */
    }
}

static void dot(unsigned opcode, unsigned pp, unsigned c, unsigned a, unsigned b)
{
    struct tile *tc = valid_tile(c), *ta = valid_tile(a), *tb = valid_tile(b);
    const uint8_t *rows = state.config.rows;
    const uint16_t *colsb = state.config.colsb;
    require(c != a && c != b && a != b, "the three tiles of a dot product must differ");
    require(colsb[a] % 4 == 0 && colsb[c] % 4 == 0, "columns must come in groups of four bytes");
    require(rows[c] == rows[a] && colsb[a] / 4 == rows[b] && colsb[b] == colsb[c], "tile shapes do not match");
    unsigned mxcsr = _mm_getcsr();
    _mm_setcsr(0x9FC0); /* round to nearest even, denormals are zero, flush to zero, exceptions masked */
    if (opcode == 0x5E) dot_int8(tc, ta, tb, rows[c], rows[b], pp);
    else dot_bf16(tc, ta, tb, rows[c], rows[b], colsb[c]);
    _mm_setcsr(mxcsr);
}

struct insn {
    const uint8_t *p; /* next byte to decode; never read beyond what the instruction is known to have */
    greg_t *regs;
    unsigned rex, mod, reg, rm, sib; /* in rex: bit 0 B, bit 1 X, bit 2 R, bit 3 W */
    uint64_t base, index;            /* base + displacement, and scaled index */
};

static greg_t *gpr(const struct insn *i, unsigned n)
{
    static const uint8_t order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return &i->regs[order[n]];
}

static int64_t immediate(struct insn *i, int bytes)
{
    int32_t v = (int8_t)*i->p;
    if (bytes == 4) memcpy(&v, i->p, 4);
    i->p += bytes;
    return v;
}

static void modrm(struct insn *i, int imm) /* imm: size of the immediate that follows, for RIP-relative addresses */
{
    unsigned byte = *i->p++, base = byte & 7;
    i->mod = byte >> 6, i->reg = (byte >> 3 & 7) | (i->rex << 1 & 8), i->rm = base | (i->rex << 3 & 8);
    if (i->mod == 3) return;
    bool no_base = base == 5 && i->mod == 0, rip = no_base;
    if ((i->sib = base == 4)) {
        byte = *i->p++, base = byte & 7, no_base = base == 5 && i->mod == 0;
        unsigned index = (byte >> 3 & 7) | (i->rex << 2 & 8);
        if (index != RSP) i->index = (uint64_t)*gpr(i, index) << (byte >> 6); /* RSP encodes none */
    }
    if (!no_base) i->base = *gpr(i, base | (i->rex << 3 & 8));
    if (i->mod != 0 || no_base) i->base += immediate(i, i->mod == 1 ? 1 : 4);
    if (rip) i->base += (uint64_t)i->p + imm;
}

static bool step_amx(greg_t *regs) /* executes the AMX instruction at RIP; false if there is none */
{
    struct insn i = {.p = (const uint8_t *)regs[REG_RIP], .regs = regs};
    if (i.p[0] != 0xC4 || (i.p[1] & 31) != 2 || (i.p[2] & 0x84) != 0) return false; /* VEX, map 0F38, W0, L0 */
    unsigned vvvv = ~(i.p[2] >> 3) & 15, pp = i.p[2] & 3, opcode = i.p[3]; /* pp: none, 66, F3, F2 */
    if (opcode != 0x49 && opcode != 0x4B && opcode != 0x5E && !(opcode == 0x5C && pp == 2)) return false;
    i.rex = ~i.p[1] >> 5 & 7, i.p += 4, modrm(&i, 0);
    if (i.reg >= TILES || (opcode < 0x5C && vvvv != 0)) return false;
    bool memory = i.mod != 3;
    void *address = (void *)(i.base + i.index);
    if (opcode >= 0x5C && !memory && i.rm < TILES && vvvv < TILES) dot(opcode, pp, i.reg, i.rm, vvvv);
    else if (opcode == 0x4B && i.sib && pp != 0) move_tile(i.reg, i.base, i.index, pp == 2);
    else if (opcode != 0x49) return false;
    else if (memory && i.reg == 0 && pp == 0) load_config(address);
    else if (memory && i.reg == 0 && pp == 1) memcpy(address, &state.config, sizeof state.config);
    else if (!memory && i.rm == 0 && pp == 3) memset(valid_tile(i.reg), 0, sizeof(struct tile));
    else if (!memory && i.rm == 0 && i.reg == 0 && pp == 0) memset(&state, 0, sizeof state); /* tilerelease */
    else return false;
    if (opcode != 0x49 || !memory) state.config.start_row = 0; /* all but the two configuration moves */
    regs[REG_RIP] = (greg_t)i.p;
    atomic_fetch_add_explicit(&emulated, 1, memory_order_relaxed);
    return true;
}

/* The result of ALU operation op (0 add, 1 or, 4 and, 5 sub, 6 xor, 7 cmp); sets all its flags but those in keep. */
static uint64_t alu(greg_t *regs, int op, uint64_t a, uint64_t b, int bits, unsigned keep)
{
    uint64_t mask = ~0ull >> (64 - bits), top = mask ^ mask >> 1, r, flags = 0;
    a &= mask, b &= mask;
    if (op == 0) r = (a + b) & mask, flags = (r < a ? CF : 0) | (~(a ^ b) & (a ^ r) & top ? OF : 0);
    else if (op == 5 || op == 7) r = (a - b) & mask, flags = (a < b ? CF : 0) | ((a ^ b) & (a ^ r) & top ? OF : 0);
    else r = op == 1 ? a | b : op == 4 ? a & b : a ^ b; /* AF, undefined after these, is clear, as processors have it */
    if (op == 0 || op == 5 || op == 7) flags |= (a ^ b ^ r) & AF;
    flags |= (__builtin_parity(r & 0xFF) ? 0 : PF) | (r ? 0 : ZF) | (r & top ? SF : 0);
    greg_t changed = (CF | PF | AF | ZF | SF | OF) & ~keep;
    regs[REG_EFL] = (regs[REG_EFL] & ~changed) | (flags & changed);
    return r;
}

static bool holds(greg_t f, unsigned cc)
{
    bool less = !(f & SF) != !(f & OF);
    bool condition[8] = {f & OF, f & CF, f & ZF, f & (CF | ZF), f & SF, f & PF, less, less || f & ZF};
    return condition[cc >> 1] != (cc & 1);
}

static uint64_t operand(const struct insn *i, int bits) /* the r/m operand */
{
    uint64_t v = 0;
    return memcpy(&v, i->mod == 3 ? (void *)gpr(i, i->rm) : (void *)(i->base + i->index), bits / 8), v;
}

/* Executes the scalar instruction at RIP if it is one of those that surround tile instructions in compiled loops, as
 * that takes nanoseconds where returning to trap again takes microseconds; false, with nothing changed, otherwise.
 * Writes to RSP are left to the processor: code could then store where this handler's own stack frame lies. The
 * caller bounds the number of steps, as code that has left the tile instructions behind should not run in here. */
static bool step_scalar(greg_t *regs)
{
    struct insn i = {.p = (const uint8_t *)regs[REG_RIP], .regs = regs};
    bool padded = false, flip = false;
    while (*i.p == 0x66 || *i.p == 0x2E) i.p++, padded = true; /* compilers lengthen nops so */
    if ((*i.p & 0xF0) == 0x40) i.rex = *i.p++ & 15;
    unsigned opcode = *i.p++, keep = 0;
    if (opcode == 0x0F) opcode = 0x0F00 | *i.p++;
    if (padded && opcode != 0x90 && opcode != 0x0F1F) return false;
    int bits = i.rex & 8 ? 64 : 32, op = -1, imm = opcode == 0x81 ? 4 : 1; /* op as in alu(), or none */
    enum { NONE, TO_REG, TO_RM } to = NONE; /* where the result goes */
    uint64_t result = 0, left, right = 0; /* flip: the r/m operand is the right one */
    switch (opcode) {
    case 0x00 ... 0x3F: /* the ALU operations */
        op = opcode >> 3, flip = (opcode & 7) == 3, to = flip ? TO_REG : TO_RM;
        if ((opcode & 7) == 1 || flip) modrm(&i, 0), right = *gpr(&i, i.reg);
        else if ((opcode & 7) == 5) i.mod = 3, right = immediate(&i, 4); /* rax, imm32 */
        else return false;
        break;
    case 0x81: case 0x83: modrm(&i, imm), right = immediate(&i, imm), op = i.reg & 7, to = TO_RM; break;
    case 0x85: modrm(&i, 0), right = *gpr(&i, i.reg), op = 4; break; /* test */
    case 0xFF: modrm(&i, 0), right = 1, op = i.reg & 7 ? 5 : 0, keep = CF, to = TO_RM; /* inc, dec */
        if ((i.reg & 7) > 1) return false;
        break;
    case 0x63: modrm(&i, 0), result = (int32_t)operand(&i, 32), to = TO_REG; break; /* movsxd */
    case 0x8B: modrm(&i, 0), result = operand(&i, bits), to = TO_REG; break;        /* mov to a register */
    case 0x89: modrm(&i, 0), result = *gpr(&i, i.reg), to = TO_RM; break;           /* mov to a register or memory */
    case 0x8D: modrm(&i, 0), result = i.base + i.index, to = TO_REG; if (i.mod == 3) return false; break; /* lea */
    case 0xB8 ... 0xBF: if (bits == 64) return false; /* mov of an immediate */
        i.mod = 3, i.rm = (opcode & 7) | (i.rex << 3 & 8), result = immediate(&i, 4), to = TO_RM; break;
    case 0x70 ... 0x7F: case 0x0F80 ... 0x0F8F: case 0xE9: case 0xEB: /* jcc, jmp */
        right = immediate(&i, opcode < 0x80 || opcode == 0xEB ? 1 : 4);
        if (opcode == 0xE9 || opcode == 0xEB || holds(regs[REG_EFL], opcode & 15)) i.p += (int64_t)right;
        break;
    case 0x90: if (i.rex & 1) return false; break; /* nop, but not xchg r8, rax */
    case 0x0F18: case 0x0F1F: modrm(&i, 0); break; /* prefetches, reserved or long nop */
    default: return false;
    }
    if (op == 7) to = NONE; /* cmp */
    if ((to == TO_REG && i.reg == RSP) || (to == TO_RM && i.mod == 3 && i.rm == RSP)) return false;
    if (op == 2 || op == 3 || (op >= 0 && to == TO_RM && i.mod != 3)) return false; /* adc, sbb; read-modify-write */
    if (op >= 0) left = operand(&i, bits), result = alu(regs, op, flip ? right : left, flip ? left : right, bits, keep);
    if (to == TO_RM && i.mod != 3) memcpy((void *)(i.base + i.index), &result, bits / 8);
    else if (to != NONE) *gpr(&i, to == TO_REG ? i.reg : i.rm) = bits == 64 ? result : (uint32_t)result;
    regs[REG_RIP] = (greg_t)i.p;
    return true;
}

static void on_sigill(int signal, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    bool fault = info->si_code > 0; /* or else sent by a process */
    if (fault && step_amx(regs))
        for (int steps = MAX_STEPS; step_amx(regs) || (steps-- > 0 && step_scalar(regs));) continue;
    else if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(signal, info, context);
    else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
        previous.sa_handler(signal);
    else if (fault || previous.sa_handler == SIG_DFL) { /* a fault kills even where it is ignored */
        sigaction(signal, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
        if (!fault) raise(signal); /* a fault happens again on return */
    }
}

int amx_emulator_install(void)
{
    struct sigaction now, ours = {.sa_sigaction = on_sigill, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || sigaction(SIGILL, NULL, &now)) return -1;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_sigill) return 0;
    previous = now; /* before the handler can run and need it */
    return sigaction(SIGILL, &ours, NULL);
}

uint64_t amx_emulator_instructions(void) { return emulated; }
