// Plays the stream that the page's query names, and counts what is decoded.
// program_test.go reads counts.

const counts = { video: 0, audio: 0, at: 0, established: false, ended: 0 };

const player = new JSMpeg.Player(`ws://${location.host}/out/${location.search.slice(1)}`, {
  canvas: document.getElementById('canvas'),
  protocols: 'null', // what the original of JSMpeg offers
  disableGl: true, // there is no GPU, and Chromium warns of it on the console
  reconnectInterval: 0,
  pauseWhenHidden: false,
  onVideoDecode: () => { counts.video++; },
  onAudioDecode: () => { counts.audio++; },
  onSourceEstablished: () => {
    counts.established = true;
    player.source.socket.addEventListener('close', () => { counts.ended++; });
  },
});

// snapshot is what was decoded until now, in ms.
function snapshot() {
  return { ...counts, at: performance.now(), width: player.renderer.width, height: player.renderer.height };
}
