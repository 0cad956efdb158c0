// The page of vw. It shows what the stats say, not what was tapped, and does
// everything through the public API. What comes from vw was named by others:
// it goes in as text, never as markup.

'use strict';

const $ = (id) => document.getElementById(id);
const http = location.origin + location.pathname.replace(/[^/]*$/, ''); // ends in a slash

// call asks the API and returns the answer. A refusal is an Error with its text.
async function call(method, path, body) {
  let r, answer;
  try {
    r = await fetch(path, { method, body: body && JSON.stringify(body), cache: 'no-store', signal: AbortSignal.timeout(10000) });
    answer = await r.json();
  } catch {
    throw new Error(r ? `vw answered ${r.status} ${r.statusText}` : 'vw does not answer');
  }
  if (r.status === 401 && path !== 'login') askToken();
  if (!r.ok) throw new Error(answer.error);
  return answer;
}

// ---- Live

const patience = 6000; // ms without an event
let source, overdue;

// listen follows the events, as long as somebody may look.
function listen() {
  source?.close();
  clearTimeout(overdue);
  if (document.hidden) return;
  source = new EventSource('api/events');
  source.onmessage = (e) => {
    again();
    show(JSON.parse(e.data));
  };
  source.onerror = async () => {
    stale('no connection');
    try {
      await call('GET', 'api/stats'); // an EventSource does not tell why
    } catch (e) {
      stale(e.message);
    }
  };
  again();
}

// again starts over when no event has come for a while: a phone that has
// changed its network is not told.
function again() {
  clearTimeout(overdue);
  overdue = setTimeout(() => {
    stale('no connection');
    listen();
  }, patience);
}

function stale(why) {
  if (!$('login').hidden) return;
  document.body.classList.add('stale');
  text($('link'), why);
}

function askToken() {
  source?.close();
  clearTimeout(overdue);
  unwatch();
  $('main').hidden = true;
  $('login').hidden = false;
  text($('link'), '');
  $('login').elements.token.focus();
}

form('login', async (f) => {
  await call('POST', 'login', { token: f.token.value });
  f.token.value = '';
  $('login').hidden = true;
  listen();
});

document.addEventListener('visibilitychange', () => {
  const name = watching?.name, sound = watching?.sound;
  listen();
  if (document.hidden) {
    unwatch();
    resume = name && (() => watch(name, sound));
  } else {
    resume?.();
  }
});
let resume;

// ---- Rows

let stats; // the last
const order = new Map(); // of a stream: its feeds as its rule had them, muted ones included

function text(node, s) {
  if (node.textContent !== s) node.textContent = s;
}

// fill sets the text of the elements of a row, by their class.
function fill(row, texts) {
  for (const name in texts) text(row.querySelector('.' + name), texts[name]);
}

// label makes the name of a row's button differ from that of the others.
function label(row, button, name) {
  const b = row.querySelector('.' + button);
  b.setAttribute('aria-label', `${b.textContent} ${name}`);
}

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
  for (const row of old.values()) row.remove();
}

const byName = (o) => Object.entries(o).sort(([a], [b]) => a.localeCompare(b, 'en', { numeric: true }));

function show(s) {
  stats = s;
  document.body.classList.remove('stale');
  $('main').hidden = false;
  text($('about'), `${s.version} · up ${span(s.uptime)}`);
  text($('link'), 'live');
  $('link').dataset.state = 'live';
  rows($('feeds'), 'feed', byName(s.feeds), makeWatch, showFeed);
  rows($('streams'), 'stream', byName(s.streams), makeStream, showStream);
  rows($('destinations'), 'destination', byName(s.destinations), makeDestination, showDestination);
  const names = Object.keys(s.streams).concat(Object.keys(s.feeds));
  if (names.join() !== $('names').dataset.of) {
    $('names').dataset.of = names.join();
    $('names').replaceChildren(...names.map((n) => new Option(n)));
  }
  if (watching) note();
}

function makeWatch(row, name) {
  label(row, 'watch', name);
  row.querySelector('.watch').onclick = () => watch(name, false);
}

function showFeed(row, f, name) {
  row.dataset.state = f.state;
  const p = f.publisher;
  fill(row, {
    name, state: f.state, rate: rate(f.bitRate),
    detail: [
      f.tracks?.map((t) => t.codec).join(', '),
      f.frameRate > 0 && `${f.frameRate.toFixed(1)} frames/s`,
      f.keyframeRate > 0 && `${f.keyframeRate.toFixed(1)} keyframes/s`,
      f.state !== 'live' && f.since && `since ${clock(f.since)}`,
      f.continuityErrors > 0 && `${f.continuityErrors} continuity errors`,
      f.damagedPackets > 0 && `${f.damagedPackets} damaged packets`,
      f.resyncs > 0 && `${f.resyncs} resyncs`,
    ].filter(Boolean).join(' · '),
    publisher: p ? `from ${p.remote}${p.agent ? `, ${p.agent}` : ''}, since ${clock(p.since)}` : '',
  });
}

function makeStream(row, name) {
  makeWatch(row, name);
  deletes(row, name, 'api/streams/' + name);
}

function showStream(row, st, name) {
  fill(row, { name, rate: rate(st.bitRate) });
  const feeds = inOrder(name, st.feeds, st.muted);
  rows(row.querySelector('.switches'), 'switch', feeds.map((f) => [f, f]), (button, feed) => {
    button.onclick = () => attempt(row, button, () => toggle(name, feed));
  }, (button, feed) => {
    const on = st.feeds.includes(feed);
    button.setAttribute('aria-checked', on);
    fill(button, { name: feed, state: !on ? 'muted' : st.present.includes(feed) ? 'on' : 'absent' });
  });
}

// inOrder returns the feeds of a stream, muted ones where they were.
function inOrder(name, feeds, muted) {
  const known = (order.get(name) ?? []).filter((f) => feeds.includes(f) || muted.includes(f));
  const all = [...new Set([...known, ...feeds, ...muted])];
  order.set(name, all);
  return all;
}

let queue = Promise.resolve(); // rules are changed one after the other

// toggle takes a feed out of its stream, or puts it back in its place. It
// begins with the rule as it is now, which others may have changed.
function toggle(name, feed) {
  const mute = stats.streams[name].feeds.includes(feed);
  return queue = queue.catch(() => {}).then(async () => {
    const now = await call('GET', 'api/streams/' + name);
    const { feeds = [], muted = [] } = stats.streams[name] ?? {}; // older than now
    const all = inOrder(name, now, [...feeds, ...muted]);
    await call('POST', 'api/streams', {
      stream: name,
      feeds: all.filter((f) => (f === feed ? !mute : now.includes(f))),
    });
  });
}

function makeDestination(row, id) {
  deletes(row, `destination ${id}`, 'api/destinations/' + id);
}

// idle is why an open destination sends nothing; '' if it does.
function idle(d) {
  const st = stats.streams[d.stream];
  if (d.id === 'apiRule') return ''; // the control link
  if (d.stream.startsWith('stream/') && !st) return 'no such stream';
  if (st && !st.feeds.length) return st.muted.length ? 'open, all muted' : 'open, no feeds';
  if (st ? !st.present.length : !stats.feeds[d.stream]?.publisher) return 'open, not published';
  return '';
}

function showDestination(row, d, id) {
  const why = d.state === 'open' && idle(d);
  row.dataset.state = why ? 'idle' : d.state;
  const dropped = Object.values(d.dropped ?? {}).reduce((a, b) => a + b, 0);
  fill(row, {
    name: id, state: why || d.state, rate: d.state === 'open' ? destinationRate(id, d.bytes) : '',
    route: `${d.stream} → ${d.destination}`,
    detail: [
      `${d.state} since ${clock(d.since)}`,
      `sent ${bytes(d.bytes)}`,
      dropped > 0 && `dropped ${dropped} messages`,
      d.state === 'open' && d.queueAge > 0.05 && `${ms(d.queueAge)} behind`,
      d.state === 'open' && d.roundTrip > 0 && `round trip ${ms(d.roundTrip)}`,
      d.reconnects > 0 && `${d.reconnects} reconnects`,
    ].filter(Boolean).join(' · '),
    reason: d.state === 'open' ? '' : d.advice ?? d.error ?? '',
    raw: [
      d.error && (d.advice || d.state === 'open') && `${d.state === 'open' ? 'Last error: ' : ''}${d.error}`,
      d.retryAt && `Next attempt at ${clock(d.retryAt)}`,
    ].filter(Boolean).join(' · '),
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
  const button = row.querySelector('.delete');
  const sure = (is) => {
    button.classList.toggle('sure', is);
    text(button, is ? 'Really delete?' : 'Delete');
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

// attempt does what a button or form is for, then shows how things are. What
// went wrong stands in its row until the next attempt.
async function attempt(row, button, f) {
  const error = row.querySelector('.error');
  text(error, '');
  button.setAttribute('aria-busy', true);
  try {
    await f();
    if (row.id !== 'login') show(await call('GET', 'api/stats'));
  } catch (e) {
    text(error, e.message);
  }
  button.removeAttribute('aria-busy');
}

function form(id, f) {
  const node = $(id);
  for (const input of node.elements) {
    input.autocapitalize = 'off';
    input.spellcheck = false;
  }
  node.onsubmit = (e) => {
    e.preventDefault();
    attempt(node, node.querySelector('button'), async () => {
      await f(node.elements);
      node.closest('details')?.removeAttribute('open');
    });
  };
}

form('addStream', async (f) => {
  const name = f.stream.value.trim().replace(/^\//, '');
  await call('POST', 'api/streams', {
    stream: name.startsWith('stream/') ? name : 'stream/' + name,
    feeds: f.feeds.value.split(/[\s,]+/).filter(Boolean),
  });
  f.stream.value = f.feeds.value = '';
});

form('addDestination', async (f) => {
  await call('POST', 'api/destinations', {
    id: f.id.value.trim(), stream: f.stream.value.trim(), destination: f.destination.value.trim(),
  });
  f.id.value = f.stream.value = f.destination.value = '';
});

// ---- Units

function rate(bits) {
  if (!bits) return '';
  return bits >= 1e6 ? `${(bits / 1e6).toFixed(2)} Mbit/s` : `${Math.round(bits / 1e3)} kbit/s`;
}

function bytes(n) {
  for (const unit of ['B', 'kB', 'MB', 'GB']) {
    if (n < 1000) return `${unit === 'B' ? n : n.toPrecision(3)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(2)} TB`;
}

const ms = (seconds) => `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;

function span(seconds) {
  const [d, h, m] = [seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60].map(Math.floor);
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.floor(seconds)} s`;
}

// clock is a time of vw's clock, as the wall beside the viewer has it.
function clock(at) {
  const t = new Date(at);
  return (Date.now() - t > 86400e3 ? t.toLocaleDateString() + ' ' : '') + t.toLocaleTimeString();
}

// ---- Preview

let watching; // name, sound, tracks, counters and the player; undefined: nothing

// Media is JSMpeg's source: a websocket of ours, since JSMpeg's own can't be
// closed before its decoder is ready.
class Media {
  constructor(name) {
    this.url = http.replace(/^http/, 'ws') + 'out/' + name;
    this.streaming = true;
    this.established = this.completed = this.closed = false;
    this.progress = 0;
  }
  connect(destination) { this.destination = destination; }
  resume() {}
  start() {
    if (this.closed) return;
    this.socket = new WebSocket(this.url);
    this.socket.binaryType = 'arraybuffer';
    this.socket.onmessage = (e) => {
      if (this.closed) return;
      this.established = true;
      this.destination.write(e.data);
      if (watching) watching.bytes += e.data.byteLength;
    };
    this.socket.onclose = () => { this.timer = setTimeout(() => this.start(), 2000); };
  }
  destroy() {
    this.closed = true;
    clearTimeout(this.timer);
    if (this.socket) {
      this.socket.onclose = null;
      this.socket.close();
    }
  }
}

// loadPlayer loads JSMpeg, once.
function loadPlayer() {
  return loadPlayer.done ??= new Promise((resolve, reject) => {
    const { player, integrity } = document.body.dataset;
    const script = document.createElement('script');
    const fail = () => {
      loadPlayer.done = undefined;
      script.remove();
      reject(new Error(`The player JSMpeg cannot be loaded from ${new URL(player, http)}. Without internet access: put the file dist/jsmpeg-player.umd.min.js of the npm package @cycjimmy/jsmpeg-player beside vw, and start vw with VW_PLAYER=jsmpeg-player.umd.min.js.`));
    };
    if (integrity) {
      script.integrity = integrity;
      script.crossOrigin = 'anonymous';
    }
    script.onload = () => (window.JSMpeg?.Player ? resolve() : fail());
    script.onerror = fail;
    script.src = player;
    document.head.append(script);
  });
}

// codecs returns those of the tracks that a feed or stream has now.
function codecs(name) {
  const feeds = stats.streams[name]?.present ?? [name];
  return feeds.flatMap((f) => stats.feeds[f]?.tracks ?? []).map((t) => t.codec);
}

const isVideo = /^(mpeg[124]video|h26|hevc|vp\d|av1|vc1|mjpeg|jpeg2000|cavs|dirac)/;

// unplayable is why JSMpeg can't show a feed or stream; "" if it can.
function unplayable(name) {
  const video = codecs(name).find((c) => isVideo.test(c) && c !== 'mpeg1video');
  return video ? `This is ${video}; the preview plays only mpeg1video (ffmpeg: -codec:v mpeg1video -bf 0).` : '';
}

async function watch(name, sound) {
  unwatch();
  const w = watching = { name, sound, pictures: 0, sounds: 0, bytes: 0, last: {}, idle: 0 };
  const box = $('preview');
  box.hidden = false;
  fill(box, { ffplay: `ffplay -fflags nobuffer -analyzeduration 1000000 ${stream(name)}` });
  text(box.querySelector('h2'), name);
  box.querySelector('.sound').setAttribute('aria-pressed', sound);
  w.why = unplayable(name);
  note();
  if (w.why) return;
  if (!window.JSMpeg) {
    try {
      await loadPlayer();
    } catch (e) {
      w.why = e.message;
    }
    if (watching !== w) return; // closed meanwhile
    if (w.why) return note();
  }
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 0; // until there is a picture
  box.querySelector('.screen').append(canvas);
  w.player = new JSMpeg.Player(name, {
    canvas, source: Media, audio: sound, pauseWhenHidden: false, videoBufferSize: 2 << 20,
    onVideoDecode: () => { w.pictures++; },
    onAudioDecode: () => { w.sounds++; },
  });
  // Browsers give sound at a tap only, iOS in its own way.
  w.player.audioOut?.context.resume();
  w.player.audioOut?.unlock();
  w.timer = setInterval(measure, 1000);
}

// measure looks once a second at what was decoded. A decoder that gets media
// and makes nothing of it for long is begun anew; one that can't is ended.
function measure() {
  const w = watching, { pictures = 0, sounds = 0, bytes = 0 } = w.last;
  w.rates = { pictures: w.pictures - pictures, sounds: w.sounds - sounds };
  w.idle = w.bytes > bytes && w.rates.pictures + w.rates.sounds === 0 ? w.idle + 1 : 0;
  w.last = { pictures: w.pictures, sounds: w.sounds, bytes: w.bytes };
  if (w.idle >= 10 || unplayable(w.name)) watch(w.name, w.sound);
  note();
}

// note tells how the preview is doing.
function note() {
  const w = watching, all = codecs(w.name), mp2 = all.includes('mp2');
  const odd = all.find((c) => !isVideo.test(c) && c !== 'mp2');
  $('preview').querySelector('.sound').hidden = !mp2 || !!w.why;
  text($('preview').querySelector('.note'), w.why || [
    !all.length && 'Not published now.',
    all.length && !w.pictures && all.some((c) => isVideo.test(c)) && 'Waiting for a keyframe.',
    w.rates?.pictures > 0 && `${w.rates.pictures} pictures/s`,
    w.sound && `${w.rates?.sounds ?? 0} frames of sound/s`,
    mp2 && !w.sound && 'Sound is off.',
    odd && `The preview plays only mp2 sound; this is ${odd}.`,
  ].filter(Boolean).join(' · '));
}

function unwatch() {
  const w = watching;
  watching = resume = undefined;
  $('preview').hidden = true;
  if (!w) return;
  clearInterval(w.timer);
  try {
    w.player?.destroy();
  } catch {} // its decoder may have died
  w.player?.source.destroy();
  $('preview').querySelector('.screen').replaceChildren();
}

$('preview').querySelector('.close').onclick = unwatch;
$('preview').querySelector('.sound').onclick = () => watch(watching.name, !watching.sound);

// stream is the address of a feed or stream for other programs. From another
// machine they need the token.
function stream(name) {
  const here = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
  return (here ? http : http.replace('://', '://any:VW_TOKEN@')) + 'ts/' + name;
}

text(document.querySelector('.post'), stream('video0'));
listen();
