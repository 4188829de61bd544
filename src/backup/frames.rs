//! Owns: from raw bytes of volumes to the objects' stored bytes: frames filled, compressed on several threads, put in order
//! again, encrypted, counted; each once for all repositories.
//! Does not own: where volumes end (`intake`), what stores do with the bytes (`store`).

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use tokio::sync::{mpsc, watch};

use super::intake::{Portion, VolumeEnd};
use super::{BackupProgress, ConfigFile};
use crate::catalog::Crc32;
use crate::catalog::backup::{ConfigEntry, VolumeEntry};
use crate::codec::encrypt::{Encryptor, Recipients};
use crate::codec::tar::TRAILER;
use crate::codec::{Crc32Parts, EncodedFrame, Encoder, Form};
use crate::repository::layout::{TarStream, VolumeName};

/// What a zstd frame of a volume holds at most, raw. Larger: more memory for each thread; smaller: a worse ratio.
pub const FRAME_BYTES: usize = 2 << 20;
/// Parts of the manifest on their way.
const MANIFEST_PART_BYTES: usize = 1 << 20;
/// Steps between the reader and the threads: frames are limited by their buffers.
const STEPS_QUEUED: usize = 4;
/// Parts waiting for a store: it goes on reading from here while the next are compressed.
pub const PARTS_QUEUED: usize = 2;
/// Buffers of frames beyond one for each thread: one is filled, one waits.
const BUFFERS_SPARE: usize = 2;

/// Everyone behind is gone: they say why.
#[derive(Debug)]
pub struct Gone;

/// What the reader hands on, in order.
#[derive(Debug)]
enum Step {
    VolumeBegin(VolumeName),
    Frame(Vec<u8>),
    VolumeEnd(VolumeEnd),
    Manifest(Bytes),
    ManifestEnd,
    Config(ConfigFile),
    /// Everything was handed on, and is what it should be.
    Finish,
}

/// What every store gets, in order.
#[derive(Clone, Debug)]
pub enum StoreItem {
    Begin(ObjectName, Form),
    Part(Bytes),
    /// The object is whole.
    End,
    /// And so is the backup.
    Finish,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectName {
    Volume(VolumeName),
    Manifest,
    Config(String),
}

/// The reader's end: fills frames.
#[derive(Debug)]
pub struct Framer {
    steps: mpsc::Sender<Step>,
    buffers: mpsc::Receiver<Vec<u8>>,
    frame: Vec<u8>,
    stream: TarStream,
    number: u32,
    manifest: Vec<u8>,
    /// Begun.
    pub volumes: u32,
}

/// The other end, to be run.
#[derive(Debug)]
pub struct Encoding {
    steps: mpsc::Receiver<Step>,
    buffers: mpsc::Sender<Vec<u8>>,
    outlets: Vec<Option<mpsc::Sender<StoreItem>>>,
    recipients: Option<Recipients>,
    level: i32,
    threads: usize,
    progress: watch::Sender<BackupProgress>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Encoded {
    pub volumes: Vec<VolumeEntry>,
    pub config: Vec<ConfigEntry>,
    pub manifest_bytes: u64,
    pub manifest_crc32: u32,
}

/// A way from the reader to `outlets`.
pub fn pipeline(
    outlets: Vec<mpsc::Sender<StoreItem>>,
    recipients: Option<Recipients>,
    level: i32,
    threads: usize,
    progress: watch::Sender<BackupProgress>,
) -> (Framer, Encoding) {
    let threads = threads.max(1);
    let count = threads + BUFFERS_SPARE;
    let (give_back, buffers) = mpsc::channel(count);
    for _ in 0..count {
        give_back.try_send(Vec::new()).expect("the channel holds all buffers there are");
    }
    let (sender, steps) = mpsc::channel(STEPS_QUEUED);
    let framer = Framer {
        steps: sender,
        buffers,
        frame: Vec::new(),
        stream: TarStream::Base,
        number: 0,
        manifest: Vec::new(),
        volumes: 0,
    };
    let outlets = outlets.into_iter().map(Some).collect();
    let encoding = Encoding { steps, buffers: give_back, outlets, recipients, level, threads, progress };
    (framer, encoding)
}

/// Frames being filled, queued and compressed; their compressed bytes until the last store has them; contexts.
pub fn memory_bytes(threads: usize) -> u64 {
    let frames = 2 * (threads.max(1) + BUFFERS_SPARE) + threads.max(1) + 2 * (PARTS_QUEUED + 1);
    (frames * FRAME_BYTES) as u64
}

impl Framer {
    pub async fn begin_stream(&mut self, stream: TarStream) -> Result<(), Gone> {
        (self.stream, self.number) = (stream, 0);
        self.begin_volume().await
    }

    async fn begin_volume(&mut self) -> Result<(), Gone> {
        self.number += 1;
        self.volumes += 1;
        let name = VolumeName { stream: self.stream, number: self.number };
        self.hand_on(Step::VolumeBegin(name)).await
    }

    pub async fn take(&mut self, portion: Portion<'_>) -> Result<(), Gone> {
        match portion {
            Portion::Bytes(bytes) => self.append(bytes).await,
            Portion::VolumeEnd(end) => {
                self.end_volume(end).await?;
                self.begin_volume().await
            }
        }
    }

    async fn append(&mut self, mut bytes: &[u8]) -> Result<(), Gone> {
        while !bytes.is_empty() {
            if self.frame.capacity() == 0 {
                self.frame = self.buffers.recv().await.ok_or(Gone)?;
                self.frame.reserve_exact(FRAME_BYTES);
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(FRAME_BYTES - self.frame.len()));
            self.frame.extend_from_slice(piece);
            bytes = rest;
            if self.frame.len() == FRAME_BYTES {
                self.hand_on_frame().await?;
            }
        }
        Ok(())
    }

    async fn hand_on_frame(&mut self) -> Result<(), Gone> {
        let frame = std::mem::take(&mut self.frame);
        match frame.is_empty() {
            true => Ok(()),
            false => self.hand_on(Step::Frame(frame)).await,
        }
    }

    /// Ends a volume with its trailer.
    pub async fn end_volume(&mut self, end: VolumeEnd) -> Result<(), Gone> {
        self.append(&TRAILER).await?;
        self.hand_on_frame().await?;
        self.hand_on(Step::VolumeEnd(end)).await
    }

    pub async fn manifest(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.manifest.extend_from_slice(bytes);
        if self.manifest.len() >= MANIFEST_PART_BYTES {
            let part = std::mem::take(&mut self.manifest);
            self.hand_on(Step::Manifest(part.into())).await?;
        }
        Ok(())
    }

    pub async fn end_manifest(&mut self) -> Result<(), Gone> {
        let part = std::mem::take(&mut self.manifest);
        self.hand_on(Step::Manifest(part.into())).await?;
        self.hand_on(Step::ManifestEnd).await
    }

    /// Everything was right: what is stored may be kept.
    pub async fn finish(self, config: Vec<ConfigFile>) -> Result<(), Gone> {
        for file in config {
            self.hand_on(Step::Config(file)).await?;
        }
        self.hand_on(Step::Finish).await
    }

    async fn hand_on(&self, step: Step) -> Result<(), Gone> {
        self.steps.send(step).await.map_err(|_| Gone)
    }
}

/// A step when the threads are done with it.
#[derive(Debug)]
enum Ready {
    Frame(EncodedFrame),
    Other(Step),
}

impl Encoding {
    /// Runs until the reader has finished or given up, or every store is gone.
    pub async fn run(mut self) -> Result<Encoded, Gone> {
        let idle: Arc<Mutex<Vec<Encoder>>> = Arc::default();
        let mut ready: FuturesOrdered<BoxFuture<'static, Ready>> = FuturesOrdered::new();
        let mut assembly = Assembly::default();
        // As many frames as threads are compressed, and one more waits in its turn.
        let width = self.threads + 1;
        loop {
            tokio::select! {
                biased;
                Some(step) = ready.next(), if !ready.is_empty() => {
                    if self.assemble(&mut assembly, step).await? {
                        return Ok(assembly.encoded);
                    }
                }
                step = self.steps.recv(), if ready.len() < width => match step {
                    Some(Step::Frame(raw)) => ready.push_back(Box::pin(self.compress(raw, idle.clone()))),
                    Some(step) => ready.push_back(Box::pin(std::future::ready(Ready::Other(step)))),
                    // The reader gave up.
                    None => return Err(Gone),
                },
            }
        }
    }

    fn compress(
        &self,
        mut raw: Vec<u8>,
        idle: Arc<Mutex<Vec<Encoder>>>,
    ) -> impl Future<Output = Ready> + Send + 'static {
        let (level, buffers) = (self.level, self.buffers.clone());
        let working = tokio::task::spawn_blocking(move || {
            let borrowed = idle.lock().expect("no borrower panics holding the lock").pop();
            let mut encoder = borrowed.unwrap_or_else(|| Encoder::for_frames(level, FRAME_BYTES));
            let frame = encoder.encode(&raw);
            idle.lock().expect("no borrower panics holding the lock").push(encoder);
            raw.clear();
            let _ = buffers.try_send(raw); // full never; closed when the reader is gone
            frame
        });
        async move {
            match working.await {
                Ok(frame) => Ready::Frame(frame),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
    }

    /// Takes the next step in order; true with the last one.
    async fn assemble(&mut self, assembly: &mut Assembly, ready: Ready) -> Result<bool, Gone> {
        match ready {
            Ready::Frame(frame) => {
                assembly.raw_crc32.append(frame.raw_crc32, frame.raw_bytes as u64);
                assembly.raw_bytes += frame.raw_bytes as u64;
                self.part(assembly, frame.bytes, Some(frame.stored_crc32)).await?;
            }
            Ready::Other(Step::VolumeBegin(name)) => {
                assembly.volume = Some(name);
                self.begin(assembly, ObjectName::Volume(name), true).await?;
            }
            Ready::Other(Step::VolumeEnd(end)) => {
                let object = self.end(assembly).await?;
                let name = assembly.volume.take().expect("a volume ends that has begun");
                assembly.encoded.volumes.push(VolumeEntry {
                    tablespace: match name.stream {
                        TarStream::Base => None,
                        TarStream::Tablespace(oid) => Some(oid),
                    },
                    number: name.number,
                    form: object.form,
                    raw_bytes: object.raw_bytes,
                    raw_crc32: Crc32(object.raw_crc32),
                    stored_bytes: object.stored_bytes,
                    stored_crc32: Crc32(object.stored_crc32),
                    manifest_files: end.files,
                });
                assert_eq!(object.raw_bytes, end.raw_bytes + TRAILER.len() as u64, "no byte of a volume is lost");
            }
            Ready::Other(Step::Manifest(part)) => {
                if !assembly.in_manifest {
                    assembly.in_manifest = true;
                    self.begin(assembly, ObjectName::Manifest, false).await?;
                }
                self.part(assembly, part, None).await?;
            }
            Ready::Other(Step::ManifestEnd) => {
                let object = self.end(assembly).await?;
                assembly.encoded.manifest_bytes = object.stored_bytes;
                assembly.encoded.manifest_crc32 = object.stored_crc32;
            }
            Ready::Other(Step::Config(file)) => self.config(assembly, file).await?,
            Ready::Other(Step::Finish) => {
                self.send(StoreItem::Finish).await?;
                return Ok(true);
            }
            Ready::Other(Step::Frame(_)) => unreachable!("frames are compressed first"),
        }
        Ok(false)
    }

    async fn config(&mut self, assembly: &mut Assembly, file: ConfigFile) -> Result<(), Gone> {
        let ConfigFile { name, path, bytes } = file;
        let (raw_bytes, raw_crc32) = (bytes.len() as u64, Crc32(crc32fast::hash(&bytes)));
        self.begin(assembly, ObjectName::Config(name.clone()), true).await?;
        self.part(assembly, bytes, None).await?;
        let Object { form, stored_bytes, stored_crc32, .. } = self.end(assembly).await?;
        let stored_crc32 = Crc32(stored_crc32);
        assembly.encoded.config.push(ConfigEntry {
            name,
            path,
            form,
            raw_bytes,
            raw_crc32,
            stored_bytes,
            stored_crc32,
        });
        Ok(())
    }

    /// Begins an object; the manifest is never encrypted.
    async fn begin(&mut self, assembly: &mut Assembly, name: ObjectName, may_encrypt: bool) -> Result<(), Gone> {
        let recipients = self.recipients.as_ref().filter(|_| may_encrypt);
        let form = if recipients.is_some() { Form::Encrypted } else { Form::Plain };
        assembly.form = form;
        assembly.encryptor = recipients.map(Encryptor::new);
        assembly.raw_crc32 = Crc32Parts::new();
        assembly.stored_crc32 = Crc32Parts::new();
        (assembly.raw_bytes, assembly.stored_bytes) = (0, 0);
        self.send(StoreItem::Begin(name, form)).await
    }

    async fn part(&mut self, assembly: &mut Assembly, plain: Bytes, crc32: Option<u32>) -> Result<(), Gone> {
        let (part, crc32) = match assembly.encryptor.take() {
            None => (plain, crc32),
            Some(mut encryptor) => {
                let (encryptor, part) = off_the_task(move || {
                    let part = encryptor.push(&plain);
                    (encryptor, part)
                })
                .await;
                assembly.encryptor = Some(encryptor);
                (part, None)
            }
        };
        self.send_part(assembly, part, crc32).await
    }

    async fn end(&mut self, assembly: &mut Assembly) -> Result<Object, Gone> {
        if let Some(encryptor) = assembly.encryptor.take() {
            let part = off_the_task(move || encryptor.finish()).await;
            self.send_part(assembly, part, None).await?;
        }
        self.send(StoreItem::End).await?;
        Ok(Object {
            form: assembly.form,
            raw_bytes: assembly.raw_bytes,
            raw_crc32: assembly.raw_crc32.finish(),
            stored_bytes: assembly.stored_bytes,
            stored_crc32: assembly.stored_crc32.finish(),
        })
    }

    async fn send_part(&mut self, assembly: &mut Assembly, part: Bytes, crc32: Option<u32>) -> Result<(), Gone> {
        if part.is_empty() {
            return Ok(());
        }
        let bytes = part.len() as u64;
        assembly.stored_bytes += bytes;
        assembly.stored_crc32.append(crc32.unwrap_or_else(|| crc32fast::hash(&part)), bytes);
        self.send(StoreItem::Part(part)).await?;
        self.progress.send_modify(|progress| progress.stored_bytes += bytes);
        Ok(())
    }

    /// To every store that is left; one that ended says why itself.
    async fn send(&mut self, item: StoreItem) -> Result<(), Gone> {
        for outlet in &mut self.outlets {
            if let Some(sender) = outlet
                && sender.send(item.clone()).await.is_err()
            {
                *outlet = None;
            }
        }
        if self.outlets.iter().any(Option::is_some) { Ok(()) } else { Err(Gone) }
    }
}

/// The object being made, and all that were.
#[derive(Debug, Default)]
struct Assembly {
    encoded: Encoded,
    volume: Option<VolumeName>,
    in_manifest: bool,
    form: Form,
    encryptor: Option<Encryptor>,
    raw_bytes: u64,
    raw_crc32: Crc32Parts,
    stored_bytes: u64,
    stored_crc32: Crc32Parts,
}

#[derive(Clone, Copy, Debug)]
struct Object {
    form: Form,
    raw_bytes: u64,
    raw_crc32: u32,
    stored_bytes: u64,
    stored_crc32: u32,
}

async fn off_the_task<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
