// The fork view's data and where the reader is in it. No element is touched here.
// A place is { card, response, index }: which prompt of those shown, which response to it, which token.
const data = JSON.parse(find("fork-data").textContent);
const PER_NAT = 10000, PER_PROBABILITY = 100000, MAX_MATCHES = 20000;

const state = {
  view: 0,
  frame: 0,
  layer: 0,
  outcome: "",
  now: null, // the place in hand
  matches: [], // places with the token after the last one as `end`
  match: -1,
  hits: new Map(), // response -> its matches
  stamp: 0, // grows whenever colours or marks of drawn tokens may have changed
};

const view = () => data.views[state.view];
const frame = () => view().frames[state.frame];
const promptsShown = () => frame().prompts.filter((prompt) => !state.outcome || prompt.outcome === state.outcome);

const entropyOf = (response, index, layer = state.layer) => {
  const value = response.e[layer][index];
  return value === null ? null : value / PER_NAT;
};
const probabilityOf = (response, index) => {
  const value = response.l[index] ?? null;
  return value === null ? null : Math.exp(value / PER_NAT);
};
const isOther = (response, index) => response.o?.[index] === "1"; // written by an environment, not by the model
const isSelected = (response, index) => response.f[index] === "1";
const isFork = (response, index) => {
  if (data.mark === null) return isSelected(response, index);
  const value = response.e[state.layer][index];
  return value !== null && value > data.mark;
};
const isTested = (response, index) => response.b !== undefined && response.b[index] !== undefined;
const textOf = (response, index) => data.texts[response.t[index]];

// The alternatives of a token, likeliest first, the one that was written among them.
const alternativesOf = (response, index) => {
  const found = [];
  for (let i = index * response.w; i < (index + 1) * response.w; i++) {
    if (response.a[i] >= 0) found.push({ id: response.a[i], probability: (response.q[i] ?? 0) / PER_PROBABILITY, rank: found.length + 1, taken: false });
  }
  const rank = response.r?.[index];
  // The rank tells apart two that look alike; of two that are equally likely it may name the other.
  const alike = found.filter((each) => each.id === response.t[index]);
  const taken = alike.find((each) => each.rank === rank) ?? alike[0];
  if (taken) taken.taken = true;
  else found.push({ id: response.t[index], probability: probabilityOf(response, index) ?? 0, rank, taken: true });
  return found;
};

// More than two responses take turns; two stand side by side.
const isTabbed = (prompt) => prompt.responses.length > 2;
const responsesInSight = (prompt) => (isTabbed(prompt) ? [prompt.active ?? 0] : prompt.responses.map((_, i) => i));

// The nearest place after (direction 1) or before (-1) `from` whose token is `wanted`, in reading order; or null.
const nearest = (prompts, from, direction, wanted) => {
  for (let card = from.card; card >= 0 && card < prompts.length; card += direction) {
    const shown = responsesInSight(prompts[card]);
    for (const number of direction > 0 ? shown : shown.reverse()) {
      const here = card === from.card && number === from.response;
      if (card === from.card && (number - from.response) * direction < 0) continue;
      const response = prompts[card].responses[number];
      for (let i = here ? from.index + direction : direction > 0 ? 0 : response.t.length - 1; i >= 0 && i < response.t.length; i += direction) {
        if (wanted(response, i)) return { card, response: number, index: i };
      }
    }
  }
  return null;
};

// Every occurrence of `query` in the responses as they are shown, across the borders of tokens. Case does not count,
// and a space stands for any white space.
const search = (prompts, query) => {
  state.matches = [];
  state.hits = new Map();
  state.match = -1;
  const words = query.trim().split(/\s+/).filter(Boolean).map((word) => word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  if (!words.length) return;
  const pattern = new RegExp(words.join("[\\s⏎⇥]+"), "giu");
  prompts.forEach((prompt, card) => prompt.responses.forEach((response, number) => {
    const text = response.t.map((id) => data.texts[id]).join("");
    const found = [];
    let index = 0, offset = 0; // offset: where token `index` starts
    for (const { 0: matched, index: start } of text.matchAll(pattern)) {
      if (state.matches.length >= MAX_MATCHES) break;
      while (offset + textOf(response, index).length <= start) offset += textOf(response, index++).length;
      let end = index, reach = offset;
      while (reach < start + matched.length) reach += textOf(response, end++).length;
      found.push({ card, response: number, index, end });
      state.matches.push(found.at(-1));
    }
    if (found.length) state.hits.set(response, found);
  }));
};
