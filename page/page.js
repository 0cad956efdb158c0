// The page of vw. It shows what the stats say, not what was tapped, and does
// everything through the public API. What comes from vw was named by others:
// it goes in as text, never as markup.

'use strict';

const $ = (id) => document.getElementById(id);
const http = location.origin + location.pathname.replace(/[^/]*$/, ''); // ends in a slash

// call asks the API and returns the answer, for which it waits 10 s or as many
// milliseconds as patient says. A refusal is an Error with its text.
async function call(method, path, body, patient) {
  let r, answer;
  try {
    r = await fetch(path, { method, body: body && JSON.stringify(body), cache: 'no-store', signal: AbortSignal.timeout(patient ?? 10000) });
    answer = await r.json();
  } catch {
    throw new Error(r ? `vw answered ${r.status} ${r.statusText}` : 'vw does not answer');
  }
  if (r.status === 401 && path !== 'login') askToken();
  if (!r.ok) throw new Error(answer.error);
  return answer;
}

// ---- Live

// One window listens to vw and tells the others of this browser, which has six
// connections to a host: each listener keeps one. Of two that listen the one
// with the greater number stops.

const patience = 6000; // ms without an event, until the page says so
const me = Math.random();
const windows = new BroadcastChannel('vw');
let source; // of events, in the window that listens
let overdue; // runs when nothing was heard for too long
let stats; // the last
let stale = true; // stats may be of the past

function listen() {
  stopListening();
  if (document.hidden) return disconnected('connecting');
  windows.postMessage({ ask: true });
  after(150, lead); // unless another window answers
}

function stopListening() {
  clearTimeout(overdue);
  if (source) windows.postMessage({ left: true });
  source?.close();
  source = undefined;
}

function after(ms, f) {
  clearTimeout(overdue);
  overdue = setTimeout(f, ms);
}

function lead() {
  source?.close();
  source = new EventSource('api/events');
  // A phone that has changed its network is not told.
  const lost = () => {
    disconnected('no connection');
    lead();
  };
  source.onmessage = (e) => {
    const s = JSON.parse(e.data);
    windows.postMessage({ from: me, stats: s });
    after(patience, lost);
    show(s);
  };
  source.onerror = async () => {
    disconnected('no connection');
    try {
      await call('GET', 'api/stats'); // an EventSource does not tell why
    } catch (e) {
      disconnected(e.message);
    }
  };
  after(patience, lost);
}

windows.onmessage = ({ data }) => {
  if (document.hidden || !data.stats && !$('login').hidden) return;
  if (data.ask) {
    if (source && !stale) windows.postMessage({ from: me, stats });
  } else if (data.left) {
    if (!source) after(300 * Math.random(), lead);
  } else {
    if (source && data.from < me) {
      source.close();
      source = undefined;
    }
    if (!source) after(2500 + 1000 * Math.random(), lead);
    show(data.stats);
  }
};

function disconnected(why) {
  if (!$('login').hidden) return;
  stale = true;
  document.body.classList.add('stale');
  text($('link'), why);
  if (stats) showRoom();
}

function askToken() {
  stopListening();
  unwatch();
  $('main').hidden = true;
  $('login').hidden = false;
  text($('link'), '');
  $('login').elements.token.focus();
}

document.addEventListener('visibilitychange', () => {
  const { name, sound, card } = watching ?? {};
  listen();
  if (document.hidden) {
    unwatch();
    resume = name && (() => watch(name, sound, card));
  } else {
    resume?.();
  }
});
addEventListener('pagehide', stopListening);

// ---- Rows

function text(node, s) {
  if (node.textContent !== s) node.textContent = s;
}

// part is the element of a row, section or form that has the class, and is not
// one of a row within it.
function part(row, name) {
  return [...row.querySelectorAll('.' + name)].find((e) => e.closest('[data-key], section, form') === row);
}

// fill sets the text of the elements of a row, by their class.
function fill(row, texts) {
  for (const name in texts) text(part(row, name) ?? row.querySelector('.' + name), texts[name]);
}

// label makes the name of a row's button differ from those of the others.
function label(row, button, name) {
  const b = part(row, button);
  b.setAttribute('aria-label', `${b.textContent} ${name}`);
  return b;
}

// dots joins what there is to say.
const dots = (...all) => all.filter(Boolean).join(' · ');

// rows keeps one row of a list for each entry, in their order. A row stays the
// same element, so that a tap or the focus is not lost; make is called once.
function rows(list, template, entries, make, update) {
  const old = new Map([...list.children].map((row) => [row.dataset.key, row]));
  entries.forEach(([key, value], i) => {
    let row = old.get(key);
    if (!row) {
      row = $(template).content.firstElementChild.cloneNode(true);
      row.dataset.key = key;
      make(row, key);
    }
    old.delete(key);
    if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
    update(row, value, key);
  });
  for (const row of old.values()) {
    if (row.contains(document.activeElement)) list.closest('section').querySelector('button, summary')?.focus();
    row.remove();
  }
}

// tone sets the colour of a state.
const tones = { live: 'good', open: 'good', absent: 'off', waiting: 'bad', refused: 'bad' };
const tone = (row, state) => { row.dataset.tone = tones[state] ?? 'warn'; };

const byName = (o) => Object.entries(o).sort(([a], [b]) => a.localeCompare(b, 'en', { numeric: true }));
const isStream = (name) => name.startsWith('stream/');

function show(s) {
  stats = s;
  stale = false;
  document.body.classList.remove('stale');
  $('main').hidden = false;
  $('login').hidden = true;
  // What a destination names has a card, be it there or not.
  const named = (of) => Object.fromEntries(Object.values(s.destinations).filter((d) => d.id !== 'apiRule' && isStream(d.stream) === of).map((d) => [d.stream, null]));
  showRoom();
  rows($('streams'), 'stream', byName({ ...named(true), ...s.streams }), makeStream, showStream);
  rows($('feeds'), 'feed', byName({ ...named(false), ...s.feeds }), makeWatch, showFeed);
  const { apiRule } = s.destinations;
  $('control').hidden = !apiRule;
  rows($('control').querySelector('ul'), 'destination', apiRule ? [['apiRule', apiRule]] : [], () => {}, showDestination);
  showDevices();
  if (watching) note();
}

// showDestinations fills the list of what goes where in the card of name.
function showDestinations(row, name) {
  const all = Object.entries(stats.destinations).filter(([id, d]) => d.stream === name && id !== 'apiRule');
  rows(part(row, 'destinations'), 'destination', byName(Object.fromEntries(all)), makeDestination, showDestination);
}

// ---- What leaves the room

const kinds = { audio: 'Sound', video: 'Picture' };
const mutedKinds = () => Object.keys(kinds).filter((kind) => stats.mute[kind]);

// tracksOf lists the tracks of a feed or stream, muted ones too.
const tracksOf = (name) => (stats.streams[name]?.present ?? [name])
  .flatMap((f) => (stats.feeds[f]?.tracks ?? []).map((t) => ({ ...t, since: stats.feeds[f].publisher?.since })));

// isMuted tells whether nothing of some tracks leaves the room. While one kind
// is muted, only what is known to be of the other passes.
function isMuted(tracks) {
  const muted = mutedKinds();
  return muted.length === 2 || muted.length > 0 && tracks.length > 0 && tracks.every((t) => t.kind === 'data' || muted.includes(t.kind));
}

// by tells who has muted a kind.
function by(kind) {
  const hands = stats.mute.by?.[kind] ?? [];
  const control = hands.includes('control') && 'from the control link';
  const here = (!control || hands.includes('here')) && 'by you';
  return [here, control].filter(Boolean).join(' and ');
}

function since(kind) {
  const at = stats.mute.since?.[kind];
  return at ? `, since ${clock(at, { hour: 'numeric', minute: '2-digit' })}` : '';
}

const muteText = (kind) => `${kinds[kind]} is muted, ${by(kind)}${since(kind)}.`;

const changed = {}; // of each kind: whether it was muted, and when this page learned that

function showRoom() {
  const room = $('room'), muted = mutedKinds();
  const all = Object.values(stats.destinations).filter((d) => d.id !== 'apiRule');
  const open = all.filter((d) => d.state === 'open');
  const words = muted.map((kind) => kinds[kind].toLowerCase()).join(' and ');
  let leaves = muted.length === 2 ? 'Nothing leaves this room' : muted.length ? `No ${words} leaves this room` : 'Nothing is muted';
  if (stale) leaves = 'What leaves this room is not known';
  text(part(room, 'leaves'), leaves);
  for (const button of room.querySelectorAll('[data-kind]')) {
    const { kind } = button.dataset, is = !!stats.mute[kind];
    if (changed[kind]?.is !== is) changed[kind] = { is, at: Date.now() };
    const n = open.filter((d) => !idle(d) && tracksOf(d.stream).some((t) => t.kind === kind)).length;
    button.setAttribute('aria-checked', !is);
    let how = is ? `is muted, ${by(kind)}${since(kind)}` : n ? `goes to ${n} relay${n > 1 ? 's' : ''}` : 'is not muted';
    if (stale) how = 'is not known: no connection';
    else if (button.classList.contains('sure')) how = 'is muted from the control link: press again to lift that';
    text(button.querySelector('.words'), how);
  }
  const silent = Object.values(stats.streams).reduce((n, st) => n + st.muted.length, 0);
  text($('about'), dots(
    `${Object.values(stats.feeds).filter((f) => f.publisher).length} feeds`, all.length && `${open.length}/${all.length} relays`,
    muted.length && `${words} muted`, silent && `${silent} muted in streams`,
  ));
  $('about').title = stats.version;
  if (!stale) text($('link'), 'live');
  $('link').dataset.tone = 'good';
  document.title = words ? `vw: ${words} muted` : 'vw';
}

// press mutes or lifts a kind. A press that lifts what was muted just now was
// meant to mute it, or is the second of a double tap. What the control link has
// muted takes two, one after the other.
function press(button) {
  const { kind } = button.dataset, { is, at } = changed[kind];
  if (stale || button.ariaBusy === 'true' || is && Date.now() - at < 800) return;
  const control = is && !!stats.mute.by?.[kind]?.includes('control');
  const sure = button.classList.toggle('sure', control && !button.classList.contains('sure'));
  changed[kind].at = Date.now();
  if (sure) return showRoom();
  attempt($('room'), button, async () => {
    stats.mute = { since: stats.mute.since, ...await call('PUT', 'api/mute', { [kind]: !is, ...(control && { control: false }) }) };
    showRoom();
  });
}

for (const button of $('room').querySelectorAll('[data-kind]')) {
  button.onclick = () => press(button);
  button.onblur = () => {
    button.classList.remove('sure');
    if (stats) showRoom();
  };
}

// ---- Feeds, streams, destinations

function makeWatch(row, name) {
  label(row, 'watch', name).onclick = () => (watching?.card === row ? unwatch() : watch(name, false, row));
}

function showFeed(row, f, name) {
  const tracks = tracksOf(name), p = f?.publisher, state = f?.state ?? 'absent', muted = p && isMuted(tracks);
  tone(row, muted ? 'absent' : state);
  fill(row, {
    name, state: state + (muted ? ', muted' : ''), rate: rate(f?.bitRate),
    tracks: dots(
      tracks.map((t) => t.codec).join(', '),
      f?.frameRate > 0 && `${f.frameRate.toFixed(0)} frames/s`,
      state !== 'live' && f?.since && `since ${clock(f.since)}`,
    ),
    more: f && dots(
      p && `from ${p.remote}${p.agent ? `, ${p.agent}` : ''}, since ${clock(p.since)}`,
      f.keyframeRate > 0 && `${f.keyframeRate.toFixed(1)} keyframes/s`,
      f.continuityErrors > 0 && `${f.continuityErrors} continuity errors`,
      f.damagedPackets > 0 && `${f.damagedPackets} damaged packets`,
      f.resyncs > 0 && `${f.resyncs} resyncs`,
      f.clock?.steps > 0 && `${f.clock.steps} clock steps`,
      f.clock?.outliers > 0 && `${f.clock.outliers} timestamps out of place`,
      f.clock?.late > 0 && `${f.clock.late} frames too late`,
      f.clock?.invalid > 0 && `${f.clock.invalid} invalid timestamps`,
    ) || 'Not published yet.',
  });
  showDestinations(row, name);
}

function makeStream(row, name) {
  makeWatch(row, name);
  part(row, 'switches').setAttribute('aria-label', `Feeds of ${name}`);
  label(row, 'send', name).onclick = () => editDestination({ stream: name });
  label(row, 'change', name).onclick = () => editStream(name);
  deletes(row, name, 'api/streams/' + name);
}

function showStream(row, st, name) {
  tone(row, st ? 'live' : 'idle');
  fill(row, { name, state: st ? '' : 'no such stream', rate: rate(st?.bitRate), change: st ? 'Change' : 'Add it' });
  label(row, 'change', name);
  part(row, 'watch').hidden = part(row, 'delete').hidden = !st;
  const { feeds = [], muted = [], present = [] } = st ?? {};
  rows(part(row, 'switches'), 'switch', byName(Object.fromEntries([...feeds, ...muted].map((f) => [f, f]))), (button, feed) => {
    button.onclick = () => {
      const mutes = stats.streams[name].feeds.includes(feed), way = mutes ? 'without' : 'with';
      if (mutes) button.at = Date.now();
      else if (Date.now() - button.at < 800) return; // the second of a double tap
      attempt(row, button, () => call('POST', 'api/streams', { stream: name, [way]: [feed] }));
    };
  }, (button, feed) => {
    const on = feeds.includes(feed), is = present.includes(feed);
    button.setAttribute('aria-checked', on);
    button.classList.toggle('dim', isMuted(tracksOf(feed)));
    fill(button, { name: feed, state: !on ? 'muted' : !is ? 'absent' : isMuted(tracksOf(feed)) ? 'muted above' : 'on' });
  });
  showDestinations(row, name);
}

function makeDestination(row, id) {
  label(row, 'change', `destination ${id}`).onclick = () => attempt(row, part(row, 'change'), async () => {
    editDestination(await call('GET', 'api/destinations/' + id), id);
  });
  label(row, 'check', `destination ${id}`).onclick = () => attempt(row, part(row, 'check'), async () => {
    text(part(row, 'found'), 'Checking, up to a minute.');
    text(part(row, 'found'), await call('POST', 'api/check/' + id, undefined, 90000));
  });
  deletes(row, `destination ${id}`, 'api/destinations/' + id);
}

// idle is why an open destination sends nothing; '' if it does.
function idle(d) {
  const st = stats.streams[d.stream];
  if (d.id === 'apiRule') return '';
  if (isStream(d.stream) && !st) return 'no such stream';
  if (st && !st.feeds.length) return st.muted.length ? 'open, all muted' : 'open, no feeds';
  if (st ? !st.present.length : !stats.feeds[d.stream]?.publisher) return 'open, not published';
  return isMuted(tracksOf(d.stream)) ? 'open, all muted' : '';
}

function showDestination(row, d, id) {
  const open = d.state === 'open', why = open && idle(d);
  const dropped = Object.values(d.dropped ?? {}).reduce((a, b) => a + b, 0);
  tone(row, why ? 'idle' : d.state);
  part(row, 'change').hidden = part(row, 'delete').hidden = id === 'apiRule';
  if (part(row, 'check').hidden = open || id === 'apiRule') text(part(row, 'found'), '');
  const muted = mutedKinds().find((kind) => tracksOf(d.stream).some((t) => t.kind === kind));
  fill(row, {
    name: id, state: why || d.state + (open && muted ? `, ${kinds[muted].toLowerCase()} muted` : ''), rate: open ? destinationRate(id, d.bytes) : '',
    route: d.destination,
    reason: open ? '' : d.advice ?? d.error ?? '',
    raw: dots(
      d.error && (d.advice || open) && `${open ? 'Last error: ' : ''}${d.error}`,
      d.retryAt && `Next attempt at ${clock(d.retryAt)}`,
    ),
    more: dots(
      `${d.state} since ${clock(d.since)}`,
      `sent ${amount(d.bytes, 'B')}`,
      dropped > 0 && `dropped ${dropped} messages`,
      open && d.queueAge > 0.05 && `${ms(d.queueAge)} behind`,
      open && d.roundTrip > 0 && `round trip ${ms(d.roundTrip)}`,
      d.reconnects > 0 && `${d.reconnects} reconnects`,
    ),
  });
}

const sent = new Map(); // of a destination: bytes at an uptime, and the rate until then

// destinationRate is what went out in the last second.
function destinationRate(id, bytes) {
  const was = sent.get(id), at = stats.uptime;
  if (was && at >= was.at && at - was.at < 0.5) return was.rate; // asked for in between
  const known = was && at > was.at && bytes >= was.bytes;
  const now = { bytes, at, rate: known ? rate((bytes - was.bytes) * 8 / (at - was.at)) : '' };
  sent.set(id, now);
  return now.rate;
}

// deletes makes the button of a row delete what, at the second tap.
function deletes(row, what, path) {
  const button = part(row, 'delete'), plain = button.textContent;
  const sure = (is) => {
    button.classList.toggle('sure', is);
    text(button, is ? `Really ${plain.toLowerCase()}?` : plain);
    label(row, 'delete', what);
  };
  sure(false);
  button.onblur = () => sure(false);
  button.onclick = () => {
    if (!button.classList.contains('sure')) {
      sure(true);
      button.focus(); // Safari does not by itself
      return;
    }
    sure(false);
    attempt(row, button, () => call('DELETE', path));
  };
}

// showDevices lists, as long as nothing is published, how to do that.
async function showDevices() {
  const box = $('devices'), none = !Object.values(stats.feeds).some((f) => f.publisher);
  if (box.hidden !== none) return;
  box.hidden = !none;
  if (!none) return;
  let found = [];
  try {
    const { cameras, microphones } = await call('GET', 'api/devices');
    found = [...cameras, ...microphones];
  } catch {} // not on this system
  found.push({ name: 'Test picture', ffmpeg: `ffmpeg -re -f lavfi -i testsrc2=size=640x480:rate=25 -f mpegts -codec:v mpeg1video -b:v 1000k -bf 0 -g 12 ${address('video0')}` });
  text(box.querySelector('p'), 'Nothing is published. With ffmpeg, on the machine of vw:');
  rows(box.querySelector('ul'), 'device', found.map((d) => [d.ffmpeg, d]), () => {}, (row, d) => {
    fill(row, { name: d.name, problem: d.problem ?? '', ffmpeg: d.ffmpeg });
  });
}

// ---- Forms

// attempt does what a button or form is for, then shows how things are. What
// went wrong stands beside it until the next attempt.
async function attempt(row, button, f) {
  const error = part(row, 'error');
  text(error, '');
  button.ariaBusy = 'true';
  try {
    await f();
  } catch (e) {
    text(error, e.message);
  }
  button.ariaBusy = null;
  if (row.id === 'login') return;
  try {
    const s = await call('GET', 'api/stats');
    windows.postMessage({ stats: s });
    show(s);
  } catch {} // the events tell
}

// form makes a form do f with what was filled in, and then closes its dialog.
function form(id, f) {
  const node = $(id);
  for (const input of node.elements) {
    input.autocapitalize = 'off';
    input.spellcheck = false;
  }
  node.onsubmit = (e) => {
    e.preventDefault();
    attempt(node, node.querySelector('button:not([type])'), async () => {
      await f(node.elements);
      node.closest('dialog')?.close(); // gives the focus back
    });
  };
  const cancel = node.querySelector('.cancel');
  if (cancel) cancel.onclick = () => node.closest('dialog').close();
  return node;
}

// edit opens the dialog of a form with what it begins with.
function edit(node, title, values, chips, input, several) {
  text(node.querySelector('h2'), title);
  text(part(node, 'error'), '');
  for (const name in values) node.elements[name].value = values[name];
  const box = part(node, 'chips');
  const mark = () => [...box.children].forEach((b) => b.setAttribute('aria-pressed', words(input).includes(b.textContent)));
  box.replaceChildren(...chips.map((name) => {
    const b = document.createElement('button');
    b.type = 'button';
    b.textContent = name;
    b.onclick = () => {
      const all = words(input);
      input.value = !several ? name : (all.includes(name) ? all.filter((w) => w !== name) : [...all, name]).join(' ');
      mark();
    };
    return b;
  }));
  input.oninput = mark;
  mark();
  node.closest('dialog').showModal();
}

const sorted = (o) => byName(o).map(([name]) => name);

form('login', async (f) => {
  await call('POST', 'login', { token: f.token.value });
  f.token.value = '';
  $('login').hidden = true;
  listen();
});

const words = (input) => input.value.split(/[\s,]+/).filter(Boolean);
const minus = (a, b) => a.filter((x) => !b.includes(x));
let edited; // the feeds that the stream in the form had; undefined: it is a new one

const streamForm = form('stream-form', async (f) => {
  const name = f.stream.value.trim().replace(/^\//, ''), feeds = words(f.feeds);
  await call('POST', 'api/streams', {
    stream: isStream(name) ? name : 'stream/' + name,
    ...(edited ? { with: minus(feeds, edited), without: minus(edited, feeds) } : { feeds }),
  });
});

// editStream changes a stream, or adds one.
function editStream(name) {
  const input = streamForm.elements.feeds;
  edited = stats.streams[name]?.feeds;
  streamForm.elements.stream.readOnly = !!name;
  edit(streamForm, !name ? 'New stream' : `${edited ? 'Change' : 'Add'} ${name}`,
    { stream: name ?? '', feeds: edited?.join(' ') ?? '' }, sorted(stats.feeds), input, true);
}

let headers; // of the destination that is edited

const destinationForm = form('destination-form', async (f) => {
  await call('POST', 'api/destinations', {
    id: f.id.value.trim(), stream: f.stream.value.trim(), destination: f.destination.value.trim(),
    ...(f.token.value && { token: f.token.value }), ...(headers && { headers }),
  });
});

// editDestination changes the destination of an id, or adds one. What is secret
// is ***, which vw takes for what it has.
function editDestination({ headers: secret, ...rule }, id) {
  let free = 0;
  while (stats.destinations[free]) free++;
  headers = secret;
  const f = destinationForm.elements;
  f.id.readOnly = !!id;
  edit(destinationForm, id ? `Change destination ${id}` : 'New destination',
    { stream: '', destination: '', token: '', id: free, ...rule }, [...sorted(stats.streams), ...sorted(stats.feeds)], f.stream);
}

$('newStream').onclick = () => editStream();
$('newDestination').onclick = () => editDestination({});

// ---- Units

function amount(n, unit) {
  let i = 0;
  for (; n >= 999.5; i++) n /= 1000;
  return `${n.toFixed(!i || n >= 100 ? 0 : n < 10 ? 2 : 1)} ${['', 'k', 'M', 'G', 'T', 'P'][i]}${unit}`;
}

const rate = (bits) => (bits ? amount(bits, 'bit/s') : '');
const ms = (seconds) => `${(seconds * 1000).toFixed(1)} ms`;

// clock is a time of vw's clock, as the wall beside the viewer has it.
function clock(at, form) {
  const t = new Date(at);
  return (Date.now() - t > 86400e3 ? t.toLocaleDateString() + ' ' : '') + t.toLocaleTimeString([], form);
}

// address is where other programs get, or post, a feed or stream. From another
// machine they need the token.
function address(name) {
  const here = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
  return (here ? http : http.replace('://', '://any:VW_TOKEN@')) + 'ts/' + name;
}

listen();
