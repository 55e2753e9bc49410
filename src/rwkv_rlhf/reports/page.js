"use strict";
// Draws the panels of a page from the JSON in #data, and of a page that is served the newest state every few seconds.

const LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22, HEIGHT = 210;
const QUIET = 10; // minutes: a page is rewritten each minute
const EVERY = 5000; // milliseconds between two looks at a run that is served

const quoted = (text) => String(text).replace(/[&<>"]/g, (c) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return Number(value.toPrecision(4)).toExponential();
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  if (low === high) { const room = Math.abs(low) * 0.1 || 1; return [low - room, high + room]; }
  return [low, high];
}

// the index of the point of a line whose step is nearest to `step`
function nearest(line, step) {
  let low = 0, high = line.x.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (line.x[middle] < step) low = middle + 1; else high = middle; }
  return low > 0 && step - line.x[low - 1] < line.x[low] - step ? low - 1 : low;
}

function path(line, x, y) {
  return line.x.map((step, at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(line.y[at]).toFixed(1)}`).join("");
}

function stroke(line) {
  const colour = `var(--c${line.colour % 6})`;
  if (line.kind === "raw") return `stroke="${colour}" stroke-width="1" opacity="0.28"`;
  return `stroke="${colour}" stroke-width="2"` + (line.kind === "held" ? ' stroke-dasharray="5 3"' : "");
}

function draw(panel, place) {
  const drawing = place.querySelector(".drawing"), tip = place.querySelector(".tip");
  const width = Math.max(200, drawing.clientWidth);
  const [first, last] = range(panel.lines.flatMap((line) => line.x));
  const [low, high] = range(panel.lines.flatMap((line) => line.y));
  const x = (step) => LEFT + (step - first) / (last - first) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  let inside = "";
  for (const at of ticks(low, high, 4)) {
    inside += `<line x1="${LEFT}" x2="${width - RIGHT}" y1="${y(at)}" y2="${y(at)}" stroke="var(--edge)"/>`;
    inside += `<text x="${LEFT - 5}" y="${y(at) + 4}" text-anchor="end">${number(at)}</text>`;
  }
  for (const at of ticks(first, last, width < 420 ? 4 : 7).filter(Number.isInteger)) {
    inside += `<text x="${x(at)}" y="${HEIGHT - 6}" text-anchor="middle">${at}</text>`;
  }
  for (const line of panel.lines) {
    inside += `<path d="${path(line, x, y)}" fill="none" ${stroke(line)}/>`;
    if (line.kind === "held" || line.x.length === 1) {
      inside += line.x.map((step, at) => `<circle cx="${x(step)}" cy="${y(line.y[at])}" r="3" fill="var(--c${line.colour % 6})"/>`).join("");
    }
  }
  inside += `<line class="cross" y1="${TOP}" y2="${HEIGHT - BOTTOM}" stroke="var(--dim)" visibility="hidden"/>`;
  drawing.innerHTML = `<svg viewBox="0 0 ${width} ${HEIGHT}" role="img" aria-label="${quoted(panel.title)} over optimizer steps">${inside}</svg>`;
  const picture = drawing.firstChild, cross = picture.querySelector(".cross");
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    const step = Math.round(first + (at - LEFT) / (width - LEFT - RIGHT) * (last - first));
    const rows = panel.lines.map((line) => [line, nearest(line, step)]);
    const near = rows.map(([line, index]) => line.x[index]).reduce((a, b) => Math.abs(a - step) <= Math.abs(b - step) ? a : b);
    cross.setAttribute("x1", x(near));
    cross.setAttribute("x2", x(near));
    cross.setAttribute("visibility", "visible");
    tip.innerHTML = `<b>step ${near}</b>` + rows.map(([line, index]) => `<br>${quoted(line.label)}: ${number(line.y[index])}` + (line.x[index] === near ? "" : ` (step ${line.x[index]})`)).join("");
    tip.style.display = "block";
    const right = at > width / 2;
    tip.style.left = right ? "auto" : `${x(near) / width * box.width + 22}px`;
    tip.style.right = right ? `${box.width - x(near) / width * box.width + 22}px` : "auto";
    tip.style.top = "40px";
  });
  picture.addEventListener("pointerleave", () => { tip.style.display = "none"; cross.setAttribute("visibility", "hidden"); });
}

function legend(panel) {
  return panel.lines.filter((line) => line.kind !== "raw").map((line) => `<span><i style="background:var(--c${line.colour % 6})"></i>${quoted(line.label)}</span>`).join("");
}

function show() {
  const panels = JSON.parse(document.getElementById("data").textContent);
  const grid = document.getElementById("curves");
  grid.innerHTML = panels.map((panel) => `<div class="panel"><h3>${quoted(panel.title)}${panel.unit ? ` <span class="dim">${quoted(panel.unit)}</span>` : ""}</h3><div class="legend">${legend(panel)}</div><div class="drawing"></div><div class="tip"></div></div>`).join("");
  panels.forEach((panel, at) => draw(panel, grid.children[at]));
}

// the answers of another validation, where somebody chose it
document.addEventListener("change", (event) => {
  if (event.target.matches("select[data-answers]")) {
    for (const answer of document.querySelectorAll(`[data-${event.target.dataset.answers}]`)) {
      answer.hidden = answer.dataset[event.target.dataset.answers] !== event.target.value;
    }
  }
});

async function look() {
  try {
    const answer = await fetch(location.href, {cache: "no-store"});
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const main = document.querySelector("main"), now = fresh.querySelector("main");
    const same = now.querySelector("#data").textContent === main.querySelector("#data").textContent;
    if (!same && !main.querySelector(":hover.panel, select:focus, details[open]")) { main.replaceWith(now); show(); }
  } catch (error) { document.getElementById("live").textContent = "the run does not answer any more"; }
}

// a page on the disk cannot know that its run was killed: it says how old it is
function age() {
  const live = document.getElementById("live");
  const minutes = live ? (Date.now() - new Date((live.dataset.written || "").replace(" ", "T"))) / 60000 : 0;
  if (minutes > QUIET) live.textContent += `; last sign of life ${minutes < 120 ? `${Math.round(minutes)} min` : `${Math.round(minutes / 60)} h`} ago`;
}

let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(show, 100); });
show();
age();
if (document.documentElement.dataset.live) setInterval(look, EVERY);
