// ---- data: what content.py wrote, read again --------------------------------------------------

const [FORWARD, TAPED, TURN, BACKWARD, COPY, DROP] = [0, 1, 2, 3, 4, 5];
const [STATE, TAPE, GRADIENT, PARAMETERS, OUTPUT, RANDOM, BUFFERS, KEPT, TRANSIENT] =
  [0, 1, 2, 3, 4, 5, 6, 7, 8];

/** The data of a text that `content.packed` made. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Sums from the left: the inverse of `content._differences`. */
function running(differences) {
  const found = new Float64Array(differences.length);
  let sum = 0;
  for (let k = 0; k < found.length; k++) found[k] = sum += differences[k];
  return found;
}

/** What `content._repeats` wrote, a function from the stage, counted from 1. */
function repeats({ kinds, which }) {
  return (stage) => kinds[which[stage - 1]];
}

/** The network: names and figures, by stage from 1. */
function readNetwork(data) {
  const blockOf = new Int32Array(data.names.length + 1).fill(-1);
  data.blocks.forEach(([, first, last], k) => blockOf.fill(k, first, last + 1));
  return {
    count: data.names.length,
    name: (i) => data.names[i - 1],
    layout: repeats(data.layouts),
    tapes: repeats(data.tapes),
    forwardSeconds: (i) => data.forwardSeconds[i - 1],
    stateBytes: (i) => data.stateBytes[i - 1],
    parameterBytes: (i) => data.parameterBytes[i - 1],
    lossSeconds: data.lossSeconds,
    blocks: data.blocks.map(([name, first, last]) => ({ name, first, last })),
    blockOf,
  };
}

/** A plan's operations, what lives how long, and what follows from both. */
function readPlan(data, network) {
  const m = data.code.length;
  const step = {
    m,
    code: Uint8Array.from(data.code),
    kind: Uint8Array.from(data.kind),
    tiers: data.tiers,
    stage: running(data.stage),
    role: Uint8Array.from(data.role),
    of: running(data.of),
    size: Float64Array.from(data.size),
    since: running(data.since),
    until: Float64Array.from(data.until),
    transient: Float64Array.from(data.transient),
    measured: data.measured.length ? running(data.measured) : null,
  };
  for (let r = 0; r < step.until.length; r++) step.until[r] += step.since[r];
  addLevels(step);
  addRuns(step, network);
  return step;
}

/** Bytes of each role while each operation runs, and all together. */
function addLevels(step) {
  step.levels = Array.from({ length: TRANSIENT + 1 }, () => new Float64Array(step.m + 1));
  for (let r = 0; r < step.role.length; r++) {
    step.levels[step.role[r]][step.since[r]] += step.size[r];
    step.levels[step.role[r]][step.until[r]] -= step.size[r];
  }
  step.total = Float64Array.from(step.transient);
  step.levels[TRANSIENT].set(step.transient);
  step.used = [];
  step.levels.forEach((level, role) => {
    if (role !== TRANSIENT) {
      for (let p = 1; p < step.m; p++) level[p] += level[p - 1];
      for (let p = 0; p < step.m; p++) step.total[p] += level[p];
    }
    if (level.some((size, p) => p < step.m && size > 0)) step.used.push(role);
  });
}

/** Seconds of each operation, which runs are made again, and what becomes of each stage. */
function addRuns(step, network) {
  const n = network.count;
  const turn = step.code.indexOf(TURN);
  step.seconds = new Float64Array(step.m);
  step.again = new Uint8Array(step.m);
  step.runs = new Int32Array(n + 1);
  step.option = new Int32Array(n + 1);
  step.kept = new Uint8Array(n + 1); // with its tape, from the forward pass on
  step.first = new Int32Array(n + 1).fill(-1); // its first run
  for (let p = 0; p < step.m; p++) {
    const [code, i] = [step.code[p], step.stage[p]];
    if (code <= TAPED) {
      step.again[p] = step.runs[i] > 0 ? 1 : 0;
      step.runs[i]++;
      if (step.first[i] < 0) step.first[i] = p;
      step.seconds[p] = network.forwardSeconds(i);
    }
    if (code === TAPED) {
      step.option[i] = step.kind[p];
      step.kept[i] = p < turn ? 1 : 0;
      step.seconds[p] = network.tapes(i)[step.option[i]][0];
    } else if (code === BACKWARD) {
      step.seconds[p] = network.tapes(i)[step.option[i]][1];
    } else if (code === TURN) {
      step.seconds[p] = network.lossSeconds;
    }
  }
  step.start = new Float64Array(step.m + 1);
  for (let p = 0; p < step.m; p++) step.start[p + 1] = step.start[p] + step.seconds[p];
}

/** What is live while an operation runs, the largest first; one row a role and stage. */
function liveAt(step, p) {
  const rows = new Map();
  for (let r = 0; r < step.since.length && step.since[r] <= p; r++) {
    if (p >= step.until[r]) continue;
    const role = step.role[r];
    const stage = role === STATE || role === TAPE || role === GRADIENT ? step.of[r] : -1;
    const key = role * 2 ** 32 + stage;
    const row = rows.get(key);
    if (row) row.size += step.size[r];
    else rows.set(key, { role, stage, size: step.size[r] });
  }
  if (step.transient[p]) rows.set(-9, { role: TRANSIENT, stage: -1, size: step.transient[p] });
  return [...rows.values()].sort((a, b) => b.size - a.size || a.role - b.role || a.stage - b.stage);
}
