// Maps of blocks: one cell a block, on a canvas, since a pool has tens of thousands of them.

export const USES = ["reserved", "free", "cached", "private", "shared", "pinned"];
const LEAST_CELL = 3;
const DIMMED = 0.16;

function colours() {
  const style = getComputedStyle(document.documentElement);
  return USES.map((use) => style.getPropertyValue(`--${use}`).trim());
}

export class BlockMap {
  // canvas: where to draw. about(i): the words on cell i, shown in the element `tip` while the mouse is there.
  constructor(canvas, tip, about, { height = 320, mostCell = 15 } = {}) {
    this.canvas = canvas;
    this.tip = tip;
    this.about = about;
    this.height = height;
    this.mostCell = mostCell;
    this.uses = "";
    canvas.addEventListener("mousemove", (event) => this.point(event));
    canvas.addEventListener("mouseleave", () => this.unpoint());
  }

  // uses: a digit for each cell, the index of its use. marked(i): whether to show cell i at full strength.
  draw(uses, marked = null) {
    this.uses = uses;
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    let cell = this.mostCell;
    while (cell > LEAST_CELL && Math.ceil(uses.length / Math.floor(width / cell)) * cell > this.height) cell -= 1;
    this.cell = cell;
    this.columns = Math.max(Math.floor(width / cell), 1);
    const rows = Math.ceil(uses.length / this.columns);
    const scale = window.devicePixelRatio || 1;
    const [wide, high] = [this.columns * cell, Math.max(rows * cell, cell)];
    if (this.canvas.width !== Math.round(wide * scale) || this.canvas.height !== Math.round(high * scale)) {
      this.canvas.width = Math.round(wide * scale);
      this.canvas.height = Math.round(high * scale);
      this.canvas.style.width = `${wide}px`;
      this.canvas.style.height = `${high}px`;
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, wide, high);
    const gap = cell >= 9 ? 2 : 1;
    colours().forEach((colour, use) => {
      context.fillStyle = colour;
      const digit = String(use);
      for (let i = uses.indexOf(digit); i >= 0; i = uses.indexOf(digit, i + 1)) {
        context.globalAlpha = marked === null || marked(i) ? 1 : DIMMED;
        context.fillRect((i % this.columns) * cell, Math.floor(i / this.columns) * cell, cell - gap, cell - gap);
      }
    });
    context.globalAlpha = 1;
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.cell);
    const i = Math.floor((event.clientY - box.top) / this.cell) * this.columns + column;
    return column < this.columns && i < this.uses.length ? i : -1;
  }

  point(event) {
    const i = this.at(event);
    if (i < 0) return this.unpoint();
    this.tip.textContent = this.about(i);
    this.tip.hidden = false;
    const box = this.tip.getBoundingClientRect();
    this.tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - box.width - 8)}px`;
    this.tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - box.height - 8)}px`;
  }

  unpoint() {
    this.tip.hidden = true;
  }
}
