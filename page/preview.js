// The preview of one feed or stream. JSMpeg plays mpeg1video and mp2, mpegts.js
// what the browser itself can decode; each gets the tracks that it can play,
// from one websocket. A preview is begun anew when its tracks change, when its
// connection is lost, and when nothing comes of the media that it gets.

'use strict';

// Of each codec: who plays it, its stream types (ISO 13818-1 table 2-34), and
// what the browser must be able to play.
const playable = {
  mpeg1video: { by: 'jsmpeg', types: [1, 2] },
  mp2: { by: 'jsmpeg', types: [3, 4] },
  h264: { by: 'mpegts', types: [0x1b], mime: 'video/mp4; codecs="avc1.42E01E"' },
  hevc: { by: 'mpegts', types: [0x24], mime: 'video/mp4; codecs="hvc1.1.6.L93.B0"' },
  aac: { by: 'mpegts', types: [0x0f], mime: 'audio/mp4; codecs="mp4a.40.2"' },
  aac_latm: { by: 'mpegts', types: [0x11], mime: 'audio/mp4; codecs="mp4a.40.2"' },
  mp3: { by: 'mpegts', types: [3, 4], mime: 'audio/mpeg' },
  opus: { by: 'mpegts', types: [6], mime: 'audio/mp4; codecs="opus"' },
};

function canPlay(codec) {
  const { by, mime } = playable[codec] ?? {};
  return by === 'jsmpeg' || !!by && !!(window.MediaSource ?? window.ManagedMediaSource)?.isTypeSupported(mime);
}

let watching; // name, sound, sight, players, counters; undefined: nothing
let resume; // watches again when the page is seen again

// sightOf is what can be seen and heard of a feed or stream now: of each kind
// a codec that can be played, those that cannot, and a key of what it depends on.
function sightOf(name) {
  const tracks = tracksOf(name);
  const open = tracks.filter((t) => !stats.mute[t.kind]);
  const pick = (kind) => open.find((t) => t.kind === kind && canPlay(t.codec))?.codec;
  const sight = { video: pick('video'), audio: pick('audio'), tracks };
  sight.cannot = [...new Set(open.filter((t) => !canPlay(t.codec) && !sight[t.kind]).map((t) => t.codec))];
  sight.key = [sight.video, sight.audio, ...tracks.map((t) => t.since + t.codec), ...mutedKinds()].join();
  return sight;
}

// watch shows the preview of a feed or stream in its card.
async function watch(name, sound, card) {
  card ??= watching?.card;
  if (card !== watching?.card) unwatch();
  endPlayers();
  const box = $('preview'), sight = sightOf(name);
  const w = watching = { name, sound, card, sight, pictures: 0, sounds: 0, bytes: 0, last: {}, idle: 0, players: [], stops: [] };
  box.hidden = false;
  if (!card.contains(box)) card.querySelector('.head').after(box); // what moves loses the focus
  card.querySelector('.watch').setAttribute('aria-pressed', true);
  fill(box, { ffplay: `ffplay -fflags nobuffer -analyzeduration 1000000 ${address(name)}` });
  w.timer = setInterval(measure, 1000);
  note();
  const engines = new Set([sight.video, sight.audio].filter(Boolean).map((codec) => playable[codec].by));
  try {
    for (const e of engines) await load(e);
  } catch (e) {
    w.why = e.message;
  }
  if (watching !== w) return; // closed meanwhile
  if (w.why) return note();
  for (const e of engines) {
    const of = (kind) => playable[sight[kind]]?.by === e && sight[kind];
    if (e === 'mpegts') w.players.push(playMPEGTS(w, of('video'), of('audio')));
    else if (of('video') || sound) w.players.push(playJSMpeg(w, of('video'), sound && of('audio')));
  }
  if (w.players.length) receive(w);
}

// load loads a player, once.
function load(name) {
  return load[name] ??= new Promise((resolve, reject) => {
    const { [name]: url, [name + 'Hash']: hash } = document.body.dataset;
    const script = document.createElement('script');
    script.onerror = () => {
      load[name] = undefined;
      script.remove();
      reject(new Error(`The player cannot be loaded from ${new URL(url, http)}. Without internet access: put the players into a folder, as README.md says, and start vw with VW_PLAYER=FOLDER.`));
    };
    script.onload = () => (window[name === 'jsmpeg' ? 'JSMpeg' : name] ? resolve() : script.onerror());
    if (hash) {
      script.integrity = hash;
      script.crossOrigin = 'anonymous';
    }
    script.src = url;
    document.head.append(script);
  });
}

const addPicture = (element) => $('preview').querySelector('.screen').prepend(element);

// receive gives what comes on the websocket to the players.
function receive(w) {
  const socket = w.socket = new WebSocket(http.replace(/^http/, 'ws') + 'out/' + w.name);
  const sieves = w.players.map((p) => new Sieve(p));
  socket.binaryType = 'arraybuffer';
  socket.onmessage = (e) => {
    w.bytes += e.data.byteLength;
    w.players.forEach((p, i) => {
      const chunk = sieves[i].pass(new Uint8Array(e.data));
      if (chunk.byteLength) p.write(chunk);
    });
  };
  socket.onclose = () => retry(w, 2000);
  w.stops.push(() => {
    socket.onclose = socket.onmessage = null;
    socket.close();
  });
}

// retry begins a preview anew, unless it has ended.
function retry(w, ms) {
  clearTimeout(w.waiting);
  w.waiting = setTimeout(() => watching === w && watch(w.name, w.sound), ms);
}

// A Sieve lets pass of a program the first track of each kind that a player
// wants. JSMpeg mixes up two tracks of a kind, mpegts.js takes mp2 for mp3.
class Sieve {
  constructor({ video, audio }) {
    this.wanted = [video, audio].map((codec) => playable[codec]?.types ?? []);
    this.pids = []; // chosen, by kind
  }

  // pass returns the packets that pass. In the map of the program, the other
  // tracks get a type that no player knows.
  pass(bytes) {
    const out = new Uint8Array(bytes.length);
    let n = 0;
    for (let at = 0; at + 188 <= bytes.length; at += 188) {
      const p = bytes.subarray(at, at + 188), pid = (p[1] & 0x1f) << 8 | p[2];
      const section = p[1] & 0x40 && p[3] & 0x10 ? 4 + (p[3] & 0x20 ? 1 + p[4] : 0) : 188;
      const table = section + 1 + p[section]; // after its pointer_field
      out.set(p, n);
      if (pid === 0 && p[table] === 0) {
        const first = p[table + 8] | p[table + 9] ? table + 10 : table + 14; // program 0 is the network's
        this.map = (p[first] & 0x1f) << 8 | p[first + 1];
      }
      if (pid === this.map && p[table] === 2) this.choose(out.subarray(n, n + 188), table);
      else if (pid && pid !== this.map && !this.pids.includes(pid) && !(pid === this.clock && !(p[3] & 0x10))) continue;
      n += 188;
    }
    return out.slice(0, n);
  }

  // choose reads the section of a program map. ISO 13818-1 2.4.4.8
  choose(p, at) {
    const end = Math.min(188, at + 3 + ((p[at + 1] & 0x0f) << 8 | p[at + 2]) - 4);
    this.pids = [];
    this.clock = (p[at + 8] & 0x1f) << 8 | p[at + 9];
    for (let i = at + 12 + ((p[at + 10] & 0x0f) << 8 | p[at + 11]); i + 5 <= end; i += 5 + ((p[i + 3] & 0x0f) << 8 | p[i + 4])) {
      const kind = this.wanted.findIndex((types, k) => types.includes(p[i]) && !this.pids[k]);
      if (kind < 0) p[i] = 0xff;
      else this.pids[kind] = (p[i + 1] & 0x1f) << 8 | p[i + 2];
    }
  }
}

function playJSMpeg(w, video, audio) {
  const canvas = document.createElement('canvas');
  let source, sink;
  canvas.width = canvas.height = 0; // until there is a picture
  if (video) addPicture(canvas);
  const player = new JSMpeg.Player(w.name, {
    source: function () { source = Object.assign(this, { streaming: true, connect: (to) => { sink = to; }, start() {}, resume() {}, destroy() {} }); },
    canvas, video: !!video, audio: !!audio, pauseWhenHidden: false, videoBufferSize: 2 << 20,
    onVideoDecode: () => { w.pictures++; },
    onAudioDecode: () => { w.sounds++; },
  });
  // Browsers give sound at a tap only, iOS in its own way.
  player.audioOut?.context.resume();
  player.audioOut?.unlock();
  w.stops.push(() => player.destroy());
  return {
    video, audio,
    write: (chunk) => {
      sink.write(chunk.buffer);
      source.established = !!video || player.audio.canPlay; // JSMpeg takes the time of what it has
    },
  };
}

function playMPEGTS(w, video, audio) {
  const element = document.createElement('video');
  element.muted = !w.sound;
  element.playsInline = true;
  if (video) addPicture(element);
  let loader, got = 0;
  class Loader extends mpegts.BaseLoader {
    open() { loader = this; this._status = mpegts.LoaderStatus.kBuffering; }
    abort() { loader = undefined; this._status = mpegts.LoaderStatus.kComplete; }
  }
  mpegts.LoggingControl.enableAll = false;
  const player = mpegts.createPlayer({ type: 'mpegts', isLive: true, url: w.name }, {
    customLoader: Loader, deferLoadAfterSourceOpen: false, autoCleanupMaxBackwardDuration: 30, autoCleanupMinBackwardDuration: 10,
    // Near live: a little faster when it is late, and a jump when it is too late.
    liveSync: true, liveSyncMaxLatency: 0.6, liveSyncTargetLatency: 0.35, liveSyncPlaybackRate: 1.2,
    liveBufferLatencyChasing: true, liveBufferLatencyMaxLatency: 1.2, liveBufferLatencyMinRemain: 0.3,
  });
  player.on(mpegts.Events.ERROR, () => retry(w, 1000));
  player.attachMediaElement(element);
  player.load();
  player.play()?.catch(() => { // sound is given at a tap only
    w.sound = !(element.muted = true);
    element.play().catch(() => {});
  });
  w.element = element;
  w.stops.push(() => player.destroy());
  return {
    video, audio,
    write: (chunk) => loader?._onDataArrival(chunk.buffer, got, got += chunk.byteLength),
  };
}

// measure looks once a second at what came of the media. A player that gets
// some and makes nothing of it for long is begun anew.
function measure() {
  const w = watching, { element } = w, { pictures = 0, sounds = 0, bytes = 0 } = w.last;
  if (element) {
    w.pictures = element.getVideoPlaybackQuality().totalVideoFrames;
    if (playable[w.sight.audio]?.by === 'mpegts') w.sounds = Math.round(element.currentTime * 1000);
    w.behind = element.buffered.length ? element.buffered.end(element.buffered.length - 1) - element.currentTime : 0;
  }
  w.rates = { pictures: w.pictures - pictures, sounds: w.sounds - sounds };
  const stuck = w.sight.video ? !w.rates.pictures : !w.rates.sounds && (w.sound || element);
  w.idle = w.bytes > bytes && stuck ? w.idle + 1 : 0;
  w.last = { pictures: w.pictures, sounds: w.sounds, bytes: w.bytes };
  if (w.idle >= (w.pictures ? 4 : 12)) watch(w.name, w.sound);
  note();
}

// note tells how the preview is doing. What is muted is dark.
function note() {
  let w = watching;
  if (!w.card.isConnected) return unwatch(); // its rule was deleted
  const sight = sightOf(w.name);
  if (sight.key !== w.sight.key) return void watch(w.name, w.sound);
  const box = $('preview'), { video, audio, tracks, cannot } = sight;
  const mutes = mutedKinds().filter((kind) => tracks.some((t) => t.kind === kind)).map(muteText);
  const out = stats.streams[w.name]?.muted ?? [];
  const why = [
    ...mutes, out.length && `Muted in this stream: ${out.join(', ')}.`,
    !tracks.length && !out.length && (stats.streams[w.name]?.feeds.length === 0 ? 'This stream has no feeds now.' : 'Not published now.'),
    w.why,
    cannot.length && `This browser's preview cannot play ${cannot.join(', ')}.`,
  ].filter(Boolean);
  text(box.querySelector('.cover'), video && !w.why ? (w.pictures ? '' : 'Waiting for a keyframe.') : why.join(' ') || 'Sound alone.');
  box.querySelector('.sound').hidden = !audio || !!w.why;
  box.querySelector('.sound').setAttribute('aria-pressed', !!w.sound);
  text(box.querySelector('.note'), dots(
    ...(video && !w.why ? why : []),
    w.rates?.pictures > 0 && `${w.rates.pictures} pictures/s`,
    w.behind > 0 && w.rates?.pictures > 0 && `${w.behind.toFixed(1)} s buffered`,
    audio && (w.sound ? 'Sound is on' : 'Sound is off'),
  ));
}

function unwatch() {
  const box = $('preview');
  resume = undefined;
  endPlayers();
  watching?.card.querySelector('.watch').setAttribute('aria-pressed', false);
  watching = undefined;
  box.hidden = true;
  document.body.append(box);
}

function endPlayers() {
  const w = watching;
  clearInterval(w?.timer);
  clearTimeout(w?.waiting);
  for (const stop of w?.stops ?? []) {
    try {
      stop();
    } catch {} // a decoder may have died
  }
  $('preview').querySelectorAll('canvas, video').forEach((e) => e.remove());
}

$('preview').querySelector('.close').onclick = () => {
  const button = watching.card.querySelector('.watch');
  unwatch();
  button.focus();
};

$('preview').querySelector('.sound').onclick = () => {
  const w = watching;
  if (playable[w.sight.audio].by === 'jsmpeg') return watch(w.name, !w.sound);
  w.sound = !w.sound;
  w.element.muted = !w.sound;
  note();
};
