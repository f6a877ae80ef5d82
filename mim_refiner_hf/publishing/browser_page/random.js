// Random numbers as torch's generator on a CPU gives them for the same seed, so that the groups
// found here are those that `mim-refiner cluster` finds (Matsumoto & Nishimura 1998: MT19937).

const SIZE = 624;
const SHIFT = 397;

export class Generator {
  constructor(seed) {
    this.state = new Uint32Array(SIZE);
    this.state[0] = seed;
    for (let i = 1; i < SIZE; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = SIZE;
  }

  // 32 random bits
  bits() {
    if (this.next === SIZE) this.twist();
    let word = this.state[this.next++];
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return (word ^ (word >>> 18)) >>> 0;
  }

  twist() {
    const { state } = this;
    for (let i = 0; i < SIZE; i++) {
      const both = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      const odd = both & 1 ? 0x9908b0df : 0;
      state[i] = state[(i + SHIFT) % SIZE] ^ (both >>> 1) ^ odd;
    }
    this.next = 0;
  }

  // torch.rand in fp32 and fp64
  uniform() {
    return (this.bits() & 0xffffff) / 2 ** 24;
  }

  uniformDouble() {
    const high = this.bits() & 0x1fffff;
    return (high * 2 ** 32 + this.bits()) / 2 ** 53;
  }

  // torch.randperm
  permutation(count) {
    const order = Uint32Array.from({ length: count }, (_, i) => i);
    for (let i = 0; i < count - 1; i++) {
      const other = i + (this.bits() % (count - i));
      [order[i], order[other]] = [order[other], order[i]];
    }
    return order;
  }

  // torch.randn of 16 numbers or more, in fp32: Box and Muller's, in blocks of 16
  normal(count) {
    const values = Float32Array.from({ length: count }, () => this.uniform());
    const block = start => {
      for (let i = start; i < start + 8; i++) {
        const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
        const angle = 2 * Math.PI * values[i + 8];
        values[i] = radius * Math.cos(angle);
        values[i + 8] = radius * Math.sin(angle);
      }
    };
    for (let start = 0; start + 16 <= count; start += 16) block(start);
    // an incomplete last block is drawn again, as one that ends with the last number
    if (count % 16) {
      for (let i = count - 16; i < count; i++) values[i] = this.uniform();
      block(count - 16);
    }
    return values;
  }
}
