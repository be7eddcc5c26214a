//! Single mappings of a process by address: `PROCMAP_QUERY` of /proc/PID/maps (6.11, include/uapi/linux/fs.h).
//!
//! To read the whole of maps for the names of a few files takes 0.4 microseconds for each mapping.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::{Error, Pid, Result};

/// `_IOWR('f', 17, struct procmap_query)`
const PROCMAP_QUERY: libc::c_ulong =
    3 << 30 | (size_of::<Query>() as libc::c_ulong) << 16 | (b'f' as libc::c_ulong) << 8 | 17;

/// `struct procmap_query`
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    dev: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

/// The mappings of a process.
#[derive(Debug)]
pub struct Procmap {
    pid: Pid,
    maps: File,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// First address, and the one after the last.
    pub range: (u64, u64),
    /// The inode of its file, with the device's major and minor number.
    pub inode: (u64, (u32, u32)),
    /// Its name, not escaped, " (deleted)" included.
    pub name: Vec<u8>,
}

impl Procmap {
    /// Opens them.
    pub fn open(pid: Pid) -> Result<Self> {
        let path = format!("/proc/{pid}/maps");
        let maps = File::open(&path).map_err(|e| Error::io("open", path, &e))?;
        Ok(Procmap { pid, maps })
    }

    /// The one at an address. `ENOENT` where there is none, `ENOTTY` where the kernel cannot be asked.
    pub fn at(&self, address: u64) -> Result<Named> {
        let mut name = [0u8; libc::PATH_MAX as usize];
        let mut query = Query {
            size: size_of::<Query>() as u64,
            address,
            name_size: name.len() as u32,
            name: name.as_mut_ptr() as u64,
            ..Query::default()
        };
        // SAFETY: a query of the size that is part of the number, with a buffer of the length that it tells.
        if unsafe { libc::ioctl(self.maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) } < 0 {
            return Err(Error::last("ioctl(PROCMAP_QUERY)", format!("/proc/{}/maps", self.pid)));
        }
        // The size counts the byte that ends it.
        let length = (query.name_size as usize).saturating_sub(1).min(name.len());
        Ok(Named {
            range: (query.start, query.end),
            inode: (query.inode, (query.dev[0], query.dev[1])),
            name: name[..length].to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_maps_tells() {
        let procmap = Procmap::open(Pid::this()).unwrap();
        let code = Procmap::at as *const () as u64;
        let named = match procmap.at(code) {
            Ok(named) => named,
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        };
        let maps = crate::maps::maps(Pid::this()).unwrap();
        let mapping = maps.iter().find(|m| m.contains(code)).unwrap();
        assert_eq!(named.range, (mapping.start, mapping.end));
        assert_eq!(named.inode, (mapping.inode, mapping.dev));
        assert_eq!(named.name, mapping.path);
        assert!(procmap.at(8).is_err());
    }
}
