// ---- words: figures and operations for people -------------------------------------------------

const UNITS = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];

/** Bytes with a unit and three digits after the point, rounded as ckptsched prints them. */
function bytesText(size, { budget = false, digits = 3 } = {}) {
  for (const [unit, scale] of UNITS) {
    if (Math.abs(size) >= scale) {
      const parts = (size * 10 ** digits) / scale;
      const whole = budget ? Math.floor(parts) : Math.ceil(parts);
      return `${(whole / 10 ** digits).toFixed(digits)} ${unit}`;
    }
  }
  return `${size} B`;
}

/** Seconds with a unit that keeps three digits or more. */
function secondsText(seconds) {
  for (const [unit, scale] of [["s", 1], ["ms", 1e-3], ["us", 1e-6]]) {
    if (Math.abs(seconds) >= scale) return `${(seconds / scale).toFixed(3)} ${unit}`;
  }
  return seconds ? `${(seconds / 1e-9).toFixed(3)} ns` : "0 s";
}

const percentText = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const signedPercent = (share, digits = 1) => `${share < 0 ? "−" : "+"}${percentText(Math.abs(share), digits)}`;
const countText = (count) => count.toLocaleString("en");

/** Name of a state's stage; state 0 is the input. */
function stateName(network, i) {
  return i === 0 ? "the input" : network.name(i);
}

/** An operation in words, such as "Forward of block.0, run again". */
function operationWords(step, network, p) {
  const [code, i, kind] = [step.code[p], step.stage[p], step.kind[p]];
  if (code === TURN) return "The loss";
  if (code === FORWARD) return `Forward of ${network.name(i)}`;
  if (code === TAPED) return `Forward with tape of ${network.name(i)}`;
  if (code === BACKWARD) return `Backward of ${network.name(i)}`;
  const value = ["state", "tape", "gradient"][kind];
  const source = ["device", "host", "disk"][(step.tiers[p] || 0) & 255];
  if (code === DROP) {
    return `Drop the ${value} of ${stateName(network, i)}${source === "device" ? "" : ` on ${source}`}`;
  }
  const target = ["device", "host", "disk"][(step.tiers[p] || 0) >> 8];
  return `Copy the ${value} of ${stateName(network, i)} from ${source} to ${target}`;
}

/** A row of `liveAt` in words. */
function liveWords(row, network, roles) {
  if (row.role === TRANSIENT) return "the operation itself";
  if (row.role === STATE) return row.stage ? `state of ${network.name(row.stage)}` : "the input";
  if (row.role === TAPE) return `tape of ${network.name(row.stage)}`;
  if (row.role === GRADIENT) return `gradient of ${stateName(network, row.stage)}`;
  return roles[row.role].toLowerCase();
}

/** What a plan does with a stage. */
function fateWords(step, i) {
  const tape = step.option[i] ? "lean tape" : "tape";
  if (step.kept[i]) return `${tape} kept`;
  return `run again, ${tape}`;
}

/** An element with attributes and content; text is never read as HTML. */
function element(name, attributes = {}, ...content) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined) found.setAttribute(key, value);
  }
  found.append(...content);
  return found;
}

/** The same for SVG. */
function shape(name, attributes = {}, text) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

/** Round numbers of a scale from 0 to a largest value, about so many. */
function ticks(largest, wanted) {
  if (!(largest > 0)) return [0];
  const raw = largest / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const width = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= raw);
  const found = [];
  for (let k = 0; k * width <= largest * (1 + 1e-9); k++) found.push(k * width);
  return found;
}

/** The unit for sizes up to a largest one. */
function unitFor(largest) {
  return UNITS.find(([, scale]) => largest >= scale) || ["B", 1];
}

/** A number of a scale without digits that say nothing. */
const tickText = (value) => String(Number(value.toPrecision(6)));
