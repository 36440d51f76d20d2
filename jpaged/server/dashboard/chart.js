// Lines over the last two minutes, as SVG.

const SVG = "http://www.w3.org/2000/svg";
export const SPAN_S = 120;
const LEFT = 48;
const TOP = 8;
const BOTTOM = 4;

function shape(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

// The least of 1, 2 and 5 times a power of ten that is not below `value`.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((k) => k * power).find((bound) => bound >= value * 0.999);
}

// lines: [time, value or null] of each point, by the line's class. format: a value in words. least: the least value
// that the axis reaches.
export function drawChart(element, now, lines, format, { isFilled = false, least = 0.001 } = {}) {
  const [width, height] = [element.clientWidth, element.clientHeight];
  if (!width) return;
  const values = Object.values(lines).flatMap((points) => points.map(([, value]) => value ?? 0));
  const top = ceiling(Math.max(...values, least));
  const x = (time) => LEFT + (1 - (now - time) / SPAN_S) * (width - LEFT);
  const y = (value) => TOP + (1 - value / top) * (height - TOP - BOTTOM);
  const drawn = [];
  for (const value of [0, top / 2, top]) {
    drawn.push(shape("line", { class: "grid", x1: LEFT, x2: width, y1: y(value), y2: y(value) }));
    const label = { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" };
    if (value) drawn.push(shape("text", label, format(value)));
  }
  for (const [name, points] of Object.entries(lines)) {
    let path = "";
    let isDown = false;
    let last = null;
    for (const [time, value] of points) {
      if (value === null) {
        isDown = false;
        continue;
      }
      const place = `${x(time).toFixed(1)} ${y(value).toFixed(1)}`;
      path += `${isDown ? "L" : "M"}${place}`;
      if (!isDown && isFilled) last = x(time);
      isDown = true;
    }
    if (!path) continue;
    if (isFilled && last !== null) {
      const area = `${path}L${x(points.at(-1)[0]).toFixed(1)} ${y(0)}L${last.toFixed(1)} ${y(0)}Z`;
      drawn.push(shape("path", { class: "area", d: area }));
    }
    drawn.push(shape("path", { class: name, d: path }));
  }
  const svg = shape("svg", { width, height, role: "img", "aria-hidden": "true" });
  svg.replaceChildren(...drawn);
  element.replaceChildren(svg);
}
