//! Owns: giving PostgreSQL a segment that is held ready: found, checked, moved. The whole of most `restore_command`s.
//! Does not own: how it came there (`source.rs`), what happens when there is none (`ask.rs`, `cli/wal_get.rs`).
//!
//! No runtime, no configuration, no lock: a few system calls. Nothing is synced here, the file was when it got its
//! name; PostgreSQL syncs what it keeps.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::place::{self, Place};
use crate::repository::durable;
use crate::wal::{SegmentName, SegmentSize};

const READ_BYTES: usize = 256 << 10;
/// Where the long header of a segment's first page has the segment's address and size.
const ADDRESS_AT: usize = 8;
const SIZE_AT: usize = 32;
const HEADER_BYTES: usize = 40;

/// Moves the segment to `dest` if it is held ready and intact; false when it has to be had otherwise. A damaged file
/// is removed.
pub fn hand_over(place: &Place, name: SegmentName, dest: &Path) -> io::Result<bool> {
    for (ready, raw_crc32) in place.all_ready()? {
        if ready != name {
            continue;
        }
        let path = place.ready(name, raw_crc32);
        match is_intact(&path, name, raw_crc32) {
            Ok(true) => {}
            Ok(false) => {
                place::remove(&path)?;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        }
        match durable::move_into_place(&path, dest) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            moved => return moved.map(|()| true),
        }
    }
    Ok(false)
}

fn is_intact(path: &Path, name: SegmentName, raw_crc32: u32) -> io::Result<bool> {
    let file = File::open(path)?;
    let Ok(size) = SegmentSize::new(file.metadata()?.len()) else { return Ok(false) };
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let address = u64::from_le_bytes(header[ADDRESS_AT..ADDRESS_AT + 8].try_into().expect("eight bytes"));
    let said_size = u32::from_le_bytes(header[SIZE_AT..SIZE_AT + 4].try_into().expect("four bytes"));
    let is_named = name.number(size).is_some_and(|number| address == size.start_of(number).0);
    Ok(is_named && u64::from(said_size) == size.bytes() && crc32_of(&file, size.bytes())? == raw_crc32)
}

/// The CRC-32 of a file. Holes are zeros that need not be read: a nearly empty segment is nearly all hole.
fn crc32_of(file: &File, length: u64) -> io::Result<u32> {
    let mut crc32 = crc32fast::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(length),
            Err(Errno::NXIO) => length,
            // A file system that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        add_zeros(&mut crc32, data - at);
        at = data;
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.min(length),
            Err(_) => length,
        };
        while at < hole {
            let part = &mut buffer[..(hole - at).min(READ_BYTES as u64) as usize];
            file.read_exact_at(part, at)?;
            crc32.update(part);
            at += part.len() as u64;
        }
    }
    Ok(crc32.finalize())
}

/// As if so many zeros had been read: by doubling, so that it hardly takes longer for more of them.
fn add_zeros(crc32: &mut crc32fast::Hasher, count: u64) {
    const BLOCK: [u8; 16 << 10] = [0; 16 << 10];
    let block_bytes = BLOCK.len() as u64;
    crc32.update(&BLOCK[..(count % block_bytes) as usize]);
    let mut blocks = count / block_bytes;
    let mut run = crc32fast::Hasher::new();
    run.update(&BLOCK);
    while blocks > 0 {
        if blocks & 1 == 1 {
            crc32.combine(&run);
        }
        let half = run.clone();
        run.combine(&half);
        blocks >>= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const NAME: &str = "000000010000000000000003";

    /// The beginning of a segment, and zeros.
    fn segment(size: SegmentSize, at: u64, data: &[u8]) -> Vec<u8> {
        let mut raw = vec![0; size.bytes() as usize];
        raw[ADDRESS_AT..ADDRESS_AT + 8].copy_from_slice(&at.to_le_bytes());
        raw[SIZE_AT..SIZE_AT + 4].copy_from_slice(&(size.bytes() as u32).to_le_bytes());
        raw[HEADER_BYTES..HEADER_BYTES + data.len()].copy_from_slice(data);
        raw
    }

    fn put(place: &Place, raw: &[u8], holes: bool) -> std::path::PathBuf {
        let path = place.ready(NAME.parse().unwrap(), crc32fast::hash(raw));
        let file = File::create(&path).unwrap();
        let end = if holes { 8192 } else { raw.len() };
        file.write_all_at(&raw[..end], 0).unwrap();
        file.set_len(raw.len() as u64).unwrap();
        path
    }

    #[test]
    fn what_is_ready_and_intact_is_moved() {
        let directory = tempfile::tempdir().unwrap();
        let (place, dest) = (Place::at(directory.path()), directory.path().join("RECOVERYXLOG"));
        let size = SegmentSize::new(1 << 20).unwrap();
        let raw = segment(size, 3 << 20, b"records");
        for holes in [true, false] {
            put(&place, &raw, holes);
            assert!(!hand_over(&place, "000000010000000000000004".parse().unwrap(), &dest).unwrap());
            assert!(hand_over(&place, NAME.parse().unwrap(), &dest).unwrap());
            assert!(fs::read(&dest).unwrap() == raw);
            assert!(!hand_over(&place, NAME.parse().unwrap(), &dest).unwrap(), "it is gone");
        }
    }

    #[test]
    fn what_is_not_what_its_name_says_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let (place, dest) = (Place::at(directory.path()), directory.path().join("RECOVERYXLOG"));
        let size = SegmentSize::new(1 << 20).unwrap();
        let raw = segment(size, 3 << 20, b"records");
        let damages: [&dyn Fn(&Path); 5] = [
            &|path| File::options().write(true).open(path).unwrap().write_all_at(b"x", 100_000).unwrap(),
            &|path| File::options().write(true).open(path).unwrap().write_all_at(b"x", 41).unwrap(),
            &|path| File::options().write(true).open(path).unwrap().set_len(1 << 19).unwrap(),
            &|path| File::options().write(true).open(path).unwrap().set_len(2 << 20).unwrap(),
            &|path| File::options().write(true).open(path).unwrap().set_len(0).unwrap(),
        ];
        for damage in damages {
            let path = put(&place, &raw, true);
            damage(&path);
            assert!(!hand_over(&place, NAME.parse().unwrap(), &dest).unwrap());
            assert!(!path.exists() && !dest.exists());
        }
        // Another segment's content under this name, with its own CRC-32.
        put(&place, &segment(size, 4 << 20, b"records"), true);
        put(&place, &segment(SegmentSize::new(2 << 20).unwrap(), 3 << 20, b"records")[..1 << 20], true);
        assert!(!hand_over(&place, NAME.parse().unwrap(), &dest).unwrap());
        assert_eq!(place.all_ready().unwrap(), []);
    }

    #[test]
    fn zeros_need_not_be_read() {
        for count in [0, 1, 7, 4096, (1 << 20) + 3] {
            let mut crc32 = crc32fast::Hasher::new();
            crc32.update(b"before");
            add_zeros(&mut crc32, count);
            crc32.update(b"after");
            let bytes = [b"before".as_slice(), &vec![0; count as usize], b"after"].concat();
            assert_eq!(crc32.finalize(), crc32fast::hash(&bytes), "{count}");
        }
    }

    #[test]
    fn a_missing_directory_holds_nothing() {
        let place = Place::at(Path::new("/no/such/directory"));
        assert!(!hand_over(&place, NAME.parse().unwrap(), Path::new("x")).unwrap());
    }
}
